"""The arithmetic of docs/precisions.md."""

from types import ModuleType

import pytest

from tests.conftest import REPO
from tests.scripts import load_script


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_script(REPO / "benchmarks" / "bench_precisions.py")


WERS = {  # fp32, fp16, int8, int4
    ("nl", "en", 16): (20, 20, 20.5, 22),
    ("nl", "ml", 16): (10, 10, 10.1, 10),
    ("nl", "en", -1): (18, 18, 18, 19.5),
    ("nl", "ml", -1): (9, 9, 9, 9.5),
}
BYTES = (400, 200, 100, 80)


@pytest.fixture
def rows(bench):
    return [
        {"language": language, "init": init, "chunk_size": size, "test_set": "slots"}
        | {"precision": precision, "wer": wer, "words": 500}
        | {"encoder_bytes": size_of, "model_bytes": size_of + 100}
        for (language, init, size), wers in WERS.items()
        for precision, wer, size_of in zip(bench.PRECISIONS, wers, BYTES, strict=True)
    ]


def cells(table, *start):
    (line,) = (line for line in table.splitlines() if line.startswith("| " + " | ".join(start)))
    return [cell.strip() for cell in line.strip("|").split("|")][len(start) :]


def test_costs_are_means_of_differences_from_fp32(bench, rows) -> None:
    rtf = [{"chunk_size": 16, "precision": "int4", "rtf": speed} for speed in (0.01, 0.03)]
    table = bench.cost_table(rows, rtf)
    assert cells(table, "int4", "320 ms") == [
        *("16.00", "+1.00", "+0.00 to +2.00"),
        *("5.00", "2.78", "0.0200"),
    ]
    assert cells(table, "int4", "offline")[1] == "+1.00"
    assert cells(table, "int8", "all")[:3] == ["14.40", "+0.15", "+0.00 to +0.50"]
    assert cells(table, "fp32", "all")[1] == "+0.00"


def test_verdicts_hold_margins_to_the_mean_and_count_single_results(bench, rows) -> None:
    int8, int4 = bench.verdicts(rows).splitlines()
    assert int8.startswith("int8 changes WER by +0.15 points on average, within the margin of 0.3")
    assert "1 of 4 single results are above it" in int8
    assert "int4 changes WER by +1.00 points on average, within the margin of 1; 2 of 4" in int4
    for row in rows:
        row["wer"] += row["precision"] == "int4"
    assert "+2.00 points on average, above the margin of 1" in bench.verdicts(rows)


def test_offline_comes_after_the_tiers(bench, rows) -> None:
    lines = bench.single_table(rows).splitlines()[2:]
    assert [line.split(" | ")[2] for line in lines] == ["320 ms", "offline"] * 2
    assert lines[0] == "| nl | en | 320 ms | 20.00 | 20.00 | 20.50 | 22.00 | 500 |"
