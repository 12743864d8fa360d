"""benchmarks/bench_decode.py: every engine is found and measured, on a model of a toy's size."""

from pathlib import Path

import pytest

from icetransfer.config import load_config
from icetransfer.model.checkpoint import save_checkpoint
from icetransfer.model.transducer import build_transducer
from tests.scripts import load_script

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return load_script(BENCHMARKS / "bench_decode.py")


def test_every_engine_is_measured(tool, nano_dims, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tool, "MOST_SPEAKERS", tool.FIRST_SPEAKERS)
    monkeypatch.setattr(tool, "PIECES", 2)
    monkeypatch.setattr(tool, "PIECE_MINUTES", 1)
    overrides = ["language=en", "decode.chunk_sizes=[8,-1]", "decode.left_context_frames=16"]
    overrides.append("decode.precisions=[fp32,int8]")
    settings = load_config([tool.CONFIG], overrides)
    checkpoint = tmp_path / "nano.pt"
    save_checkpoint(checkpoint, build_transducer(nano_dims, seed=5))
    folder = tmp_path / "bundles"
    folder.mkdir()
    tool.export_all(checkpoint, folder, settings)
    cases = list(tool.bundle_cases(folder, settings))
    cases += tool.torch_cases(checkpoint, cases)
    assert {(case.engine, case.precision) for case in cases} == {
        *((engine, p) for engine in ("onnxruntime", "sherpa") for p in ("fp32", "int8")),
        *((engine, "fp32") for engine in ("masked", "torch")),
    }
    assert {(case.chunk_size, case.left_context_frames) for case in cases} == {(8, 16)}
    recordings = [noise[:32000] for noise in tool.made_up_recordings(4)]
    found = [tool.measure(case, recordings, 2) for case in cases]
    for case, row in zip(cases, found, strict=True):
        assert row["rtf_one_stream"] > 0 and row["streams_per_core"] > 0
        assert row["model_bytes"] == case.model_bytes
        assert (row.get("real_time_streams") == 4) == (case.engine in tool.POOLED)
    assert tool.results_table(cases, found).row_count == len(cases)
    pooled = next(case for case in cases if case.engine == "torch")
    hour = tool.hour(pooled, recordings)
    assert len(hour["cpu_seconds"]) == len(hour["peak_mib"]) == 2
    assert tool.hour_table([pooled], [hour]).row_count == 1
