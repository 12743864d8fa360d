"""benchmarks/bench_soak.py: drift is found where there is one, and both engines go through."""

from pathlib import Path

import numpy as np
import pytest

from icetransfer.streaming.exported import Exported
from icetransfer.streaming.search import Hypothesis
from tests.scripts import load_script

BENCHMARK = Path(__file__).resolve().parents[3] / "benchmarks" / "bench_soak.py"


@pytest.fixture
def tool():
    return load_script(BENCHMARK)


def test_drift_is_that_of_the_rounds_that_are_alike(tool) -> None:
    ten_seconds = 160_000  # 250 encoder outputs
    steady = [250 * number + frame for number in range(100) for frame in (10, 20, 30)]
    said = tool.drift(Hypothesis([3] * 300, steady), ten_seconds, 100)
    assert "100 of 100 rounds have 3 tokens" in said and "at most 0 ms" in said
    later = [250 * n + n // 36 + frame for n in range(360) for frame in (10, 20, 30)]
    said = tool.drift(Hypothesis([3] * 1080, later[:-1]), ten_seconds, 360)
    assert "359 of 360 rounds" in said
    assert float(said.partition("drift ")[2].split()[0]) == pytest.approx(400, rel=0.02)
    assert tool.drift(Hypothesis([], []), ten_seconds, 3) == "no token, so no drift"


@pytest.mark.parametrize("name", ["sherpa", "onnxruntime"])
def test_a_short_soak(tool, nano_bundle: Exported, name: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr(tool, "CROWD", 3)
    noise = 0.1 * np.random.default_rng(1).standard_normal(20_000).astype(np.float32)
    engine = tool.Engine(name, nano_bundle.dir)
    once = tool.make_round([noise, noise[:9000]], 16)
    assert len(once) % (16 * 320) == 0
    tool.stream_for(engine, once, 0.0, "speech")
    tool.crowd(engine, [noise, noise[:9000]])
    printed = capsys.readouterr().out
    assert "CPU s per hour" in printed and "rounds have" in printed and "drift" in printed
    assert "3 at once" in printed and "; 0 have other tokens than alone" in printed
