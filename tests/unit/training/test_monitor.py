"""What can be watched of a run, also on a disk that is full."""

import json
from contextlib import suppress
from pathlib import Path

import pytest

from icetransfer.training.monitor import Reporter

NUMBERS = {"loss": 1.0, "lr": 0.1, "audio_per_second": 10.0}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # its thread
def test_on_a_full_disk_numbers_are_lost_and_the_run_goes_on(small_disk: Path, caplog) -> None:
    reporter = Reporter(small_disk, 0, 100)
    reporter.report(1, NUMBERS, "train")
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    for step in range(2, 100):
        reporter.report(step, NUMBERS | {f"number-{n}": 0.1 for n in range(50)}, "train")
    assert "metrics.jsonl: a line could not be added (No space left on device)" in caplog.text
    filler.unlink()
    reporter.report(100, NUMBERS, "dev")
    reporter.close()
    lines = (small_disk / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["step"] == 1 and json.loads(lines[-1])["step"] == 100
