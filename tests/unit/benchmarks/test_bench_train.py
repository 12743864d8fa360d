"""The bench of the training step: its table and JSON, and the exponents of growth."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts import load_script

BENCH = Path(__file__).resolve().parents[3] / "benchmarks" / "bench_train.py"


@pytest.fixture(scope="module")
def bench():
    return load_script(BENCH)


def test_slope_is_the_exponent_of_a_power_law(bench):
    x = [5.0, 10.0, 20.0, 60.0]
    assert bench.slope(x, [3 * value**1.5 for value in x]) == pytest.approx(1.5)


def test_table_and_json():
    command = [sys.executable, str(BENCH), "--sizes", "tiny", "--rounds", "1"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = json.loads(out.splitlines()[-1])
    cost = found["cases"]["tiny"]
    assert set(cost["seconds"]) == {"data", "encoder", "loss", "backward", "optimiser"}
    assert all(seconds > 0 for seconds in cost["seconds"].values())
    assert cost["gflop"]["backward"] == 2 * (cost["gflop"]["encoder"] + cost["gflop"]["loss"])
    assert cost["audio_seconds"] == 60 and cost["peak_mib"] > 0
    assert found["gflops"]["matmul"] > 0
    assert "of matmul" in out and "peak memory" in out
