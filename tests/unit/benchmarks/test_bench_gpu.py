"""The bench of a GPU in its form for the CPU: precisions, and a training in half precision."""

import re
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[3] / "benchmarks" / "bench_gpu.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_precisions_and_a_training_in_half_precision() -> None:
    done = run("--cpu", "numerics", "training")
    assert done.returncode == 0, done.stderr
    # icefall's errors in bf16 are 4.9e-3 and 5.3e-3 (66 M, random weights).
    bounds = {"fp32": (1e-5, 1e-5), "bf16": (4.9e-3, 5.3e-3), "fp16": (7e-4, 9e-4)}
    found = re.findall(r"numerics, tiny, (\w+): output (\S+), gradient (\S+)", done.stdout)
    assert [precision for precision, *_ in found] == list(bounds)
    for precision, *errors in found:
        for error, bound in zip(map(float, errors), bounds[precision], strict=True):
            assert 0 < error < bound, precision
    lines = re.findall(r"training, tiny, (\w+) on cpu: (.*)", done.stdout)
    losses = {name: [float(x) for x in re.findall(r": ([\d.]+)", text)] for name, text in lines}
    assert set(losses) == {"fp32", "fp16"}
    for name, values in losses.items():
        assert values[-1] < 0.8 * values[0], name


def test_what_needs_a_gpu_says_so() -> None:
    assert "memory needs a GPU" in run("--cpu", "memory").stderr
    assert "no table speed" in run("--cpu", "speed").stderr
