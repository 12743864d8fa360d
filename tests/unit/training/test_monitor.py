"""What can be watched of a run, also on a disk that is full."""

import json
import threading
from contextlib import suppress
from pathlib import Path

from icetransfer.training.monitor import Reporter

NUMBERS = {"loss": 1.0, "lr": 0.1, "audio_per_second": 10.0}


def test_on_a_full_disk_numbers_are_lost_and_the_run_goes_on(
    small_disk: Path, caplog, monkeypatch
) -> None:
    printed: list[threading.ExceptHookArgs] = []  # the errors of threads
    monkeypatch.setattr(threading, "excepthook", printed.append)
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
    assert threading.excepthook == printed.append
    assert not printed, "TensorBoard's thread tells nothing of its own"
    told = [line for line in caplog.messages if "tensorboard is not written any more" in line]
    assert told == [f"{small_disk}/tensorboard is not written any more (No space left on device)"]
    lines = (small_disk / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["step"] == 1 and json.loads(lines[-1])["step"] == 100


def test_errors_of_other_threads_are_told_as_ever(tmp_path: Path, monkeypatch) -> None:
    told: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    reporter = Reporter(tmp_path, 0, 100)
    thread = threading.Thread(target=(tmp_path / "absent").read_text)
    thread.start()
    thread.join()
    reporter.close()
    assert [error.exc_type for error in told] == [FileNotFoundError]
