"""Files that grow by lines: torn ones, full disks."""

import json
from pathlib import Path

import pytest

from icetransfer.stage.lines import append_line, last_lines, read_lines

LINES = [{"step": 1, "loss": 0.5}, {"step": 2}, {"step": 3, "loss": 0.25}]


def test_what_is_appended_is_read(tmp_path: Path) -> None:
    path = tmp_path / "log" / "cost.jsonl"
    assert read_lines(path, ["step"]) == last_lines(path, 100, ["step"]) == []
    for line in LINES:
        append_line(path, line)
    assert read_lines(path, ["step"]) == last_lines(path, 1000, ["step"]) == LINES
    assert last_lines(path, 40, ["step"]) == LINES[1:]  # the first is cut by where reading begins


@pytest.mark.parametrize("left", [1, 8, 21])
def test_a_torn_line_costs_itself_alone(tmp_path: Path, caplog, left: int) -> None:
    path = tmp_path / "metrics.jsonl"
    for line in LINES[:2]:
        append_line(path, line)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 3, "loss": 0.'[:left])
    append_line(path, LINES[2])
    assert read_lines(path, ["step"]) == LINES
    assert f"{path}, line 3: left out: it is torn" in caplog.text


@pytest.mark.parametrize(
    "torn",
    ['{"step": 1, "los{"step": 2}', "12", "[1]", "{}", "\0\0\0", "\udcff"],
)
def test_lines_of_anything_else_are_named_and_left_out(tmp_path: Path, caplog, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes((torn + "\n").encode(errors="surrogateescape") + json.dumps(LINES[0]).encode())
    assert read_lines(path, ["step"]) == LINES[:1]
    assert f"{path}, line 1" in caplog.text


def test_a_full_disk_is_a_warning_and_the_next_line_is_whole(small_disk: Path, caplog) -> None:
    path = small_disk / "metrics.jsonl"
    append_line(path, LINES[0])
    (small_disk / "filler").write_bytes(b"x" * (512 * 1024 - 4096 - 4096))
    append_line(path, {"step": 2, "text": "y" * 10_000})
    assert f"{path}: a line could not be added (No space left on device)" in caplog.text
    (small_disk / "filler").unlink()
    append_line(path, LINES[2])
    assert read_lines(path, ["step"]) == [LINES[0], LINES[2]]
