"""The arithmetic of the table of live streams in docs/speed.md."""

from types import ModuleType

import pytest

from tests.conftest import REPO
from tests.scripts import load_script


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    return load_script(REPO / "benchmarks" / "bench_streams.py")


def test_waiting(bench) -> None:
    costs = {1: 0.01, 16: 0.04}
    assert bench.simulate(16, costs, 1) == pytest.approx(0.01)  # nobody else is there
    few, many = (bench.simulate(16, costs, streams) for streams in (8, 80))
    assert 0.01 < few < many < 0.32
    assert bench.simulate(16, costs, 160) > 10  # more than a core bears: the queue grows


def test_table(bench) -> None:
    rows = [
        {"size": "tiny", "chunk": 16, "streams": n, "variant": variant, "times": [9.0, 9.0, 9.0, t]}
        for variant, times in (("traced fp32", (0.02, 0.16)), ("int8", (0.01, 0.08)))
        for n, t in zip((1, 16), times, strict=True)
    ]
    lines = bench.make_table({"rows": rows}).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][:8] == ["tiny", "320 ms", "traced fp32", "20.0", "1.00", "16", "32", "1.00"]
    assert cells[1][2:8] == ["int8", "10.0", "2.00", "32", "64", "2.00"]
    assert cells[1][8].endswith("(51)")
