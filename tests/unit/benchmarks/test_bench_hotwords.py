"""The bench of hotwords chooses words that are missed."""

from pathlib import Path

from tests.scripts import load_script

BENCH = Path(__file__).resolve().parents[3] / "benchmarks" / "bench_hotwords.py"


def test_hotwords_are_long_words_that_are_said_more_often_than_heard() -> None:
    bench = load_script(BENCH)
    rows = [
        {"ref": "morgen komt morgen an", "hyp": "morgen kont am"},
        {"ref": "zondag", "hyp": "zondag vrijdag"},
    ]
    assert bench.missed_words(rows) == ["morgen"]
