"""Every stage, as a user types it, from nothing to WER tables of all engines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
CONFIG = """\
language: en
init: random
data:
  vocab_size: 100
  corpora:
    slots: {kind: synthetic, minutes: {train: 1, dev: 0.3, test: 0.3}}
transfer: {size: tiny}
train: {max_steps: 4, batch_seconds: 20, valid_every: 4, checkpoint_every: 2, log_every: 2}
decode: {chunk_sizes: [16, -1]}
"""
STAGES = (
    "data.download",
    "data.corpora",
    "data.features",
    "data.subset",
    "data.tokenizer",
    "transfer",
    "train",
    "average",
    "export",
    "decode",
    "score",
    "pack",
)


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a recipe 'with' $(odd) name")
    (folder / "conf.yaml").write_text(CONFIG)
    made = run(folder, "icetransfer.experiment", "--conf", "conf.yaml", "--exp", "exp/run")
    assert made.returncode == 0, made.stderr
    for stage in STAGES:
        done = run(folder, f"icetransfer.{stage}", "--exp", "exp/run")
        assert done.returncode == 0, f"{stage}: {done.stderr}"
    return folder


def test_every_engine_precision_and_tier_has_its_wer(finished: Path) -> None:
    results = [json.loads(p.read_text()) for p in finished.glob("exp/run/decode/slots/*/wer.json")]
    found = {(r["engine"], r["precision"], r["chunk_size"]) for r in results}
    tiers = (16, -1)
    expected = {("torch", "fp32", tier) for tier in tiers}
    expected |= {("sherpa", p, tier) for p in ("fp32", "int8") for tier in tiers}
    assert found == expected
    for result in results:
        errors = result["insertions"] + result["deletions"] + result["substitutions"]
        assert result["errors"] == errors
        assert result["wer"] == pytest.approx(100 * errors / result["words"], abs=0.01)


def test_a_second_run_does_nothing_again(finished: Path) -> None:
    kept = [
        finished / "exp/run/init.pt",
        finished / "exp/run/averaged.pt",
        *finished.glob("exp/run/decode/*/*/wer.json"),
    ]
    before = [path.stat().st_mtime_ns for path in kept]
    for stage in ("transfer", "train", "average", "decode"):
        assert run(finished, f"icetransfer.{stage}", "--exp", "exp/run").returncode == 0
    assert [path.stat().st_mtime_ns for path in kept] == before


def test_a_stage_out_of_order_says_which_one_to_run(tmp_path: Path) -> None:
    (tmp_path / "conf.yaml").write_text(CONFIG)
    run(tmp_path, "icetransfer.experiment", "--conf", "conf.yaml", "--exp", "exp/run")
    early = run(tmp_path, "icetransfer.average", "--exp", "exp/run")
    assert early.returncode == 2
    assert "run stage 6 to its end" in early.stderr
