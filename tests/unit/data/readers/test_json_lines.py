"""NeMo's manifests as people write them: each line is read rightly, or named with its field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from icetransfer.data.readers.json_lines import read_json_lines
from icetransfer.data.readers.tables import common_folder
from icetransfer.data.utterances import Rejection, Utterance

GOOD = {"audio_filepath": "a.wav", "duration": 3.2, "text": "ja"}


def read(manifest: Path, content: str | bytes) -> list[Utterance | Rejection]:
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_json_lines(manifest, "train", manifest.parent))


def good(manifest: Path, content: str | bytes) -> list[Utterance]:
    found = read(manifest, content)
    assert not [line for line in found if isinstance(line, Rejection)]
    return [line for line in found if isinstance(line, Utterance)]


@pytest.mark.parametrize(
    ("fields", "reason", "advice"),
    [
        ({"text": None}, "text is null, not a string", 'write "text": "..."'),
        ({"text": 12}, "text is 12, not a string", 'write "text": "..."'),
        ({"text": "\ud83d"}, "text has half of a character", 'write "text": "..."'),
        ({"audio_filepath": None}, "audio_filepath is null", 'write "audio_filepath": "..."'),
        ({"audio_filepath": ["a", "b"]}, 'audio_filepath is ["a", "b"]', "audio_filepath"),
        ({"offset": -1.5}, "offset -1.5 is negative", "from the beginning of the file"),
        ({"offset": 10**400}, "offset is 1000", "write seconds"),
        ({"offset": "one"}, 'offset is "one", not a number', "write seconds"),
        ({"duration": 0}, "duration 0 is not positive", "or leave the key out"),
        ({"duration": float("nan")}, "duration is NaN, not a number", "write seconds"),
        ({"channel": 1}, "channel 1: audio of one channel is read", "a file of its own"),
        ({"speaker": "\udc00"}, "speaker has half of a character", "JSON object"),
    ],
)
def test_a_field_that_is_wrong_is_named(
    tmp_path: Path, fields: dict[str, Any], reason: str, advice: str
) -> None:
    lines = [json.dumps(row) for row in (GOOD, GOOD | fields, GOOD | {"audio_filepath": "b.wav"})]
    found = read(tmp_path / "m.jsonl", "\n".join(lines))
    assert [line.id for line in found] == ["a", "m.jsonl:2", "b"]
    assert isinstance(found[1], Rejection)
    assert found[1].path == str(tmp_path / "m.jsonl")
    assert found[1].reason.startswith(reason)
    assert advice in found[1].advice


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"audio_filepath": "a.wav"}', "no text"),
        (b'{"text": "ja"}', "no audio_filepath"),
        (b'"a.wav"', "a JSON str, not an object"),
        (b"{", "not a line of a NeMo manifest (JSONDecodeError"),
        (b'{"audio_filepath": "a.wav", "text": "j\xe9"}', "not UTF-8"),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    found = read(tmp_path / "m.jsonl", line + b"\n" + json.dumps(GOOD).encode())
    assert isinstance(found[0], Rejection)
    assert found[0].reason.startswith(reason)
    assert [line.id for line in found] == ["m.jsonl:1", "a"]


def test_a_list_among_the_lines_is_one_wrong_line(tmp_path: Path) -> None:
    found = read(tmp_path / "m.jsonl", f"{json.dumps(GOOD)}\n[\n[1]\n")
    assert [line.id for line in found] == ["a", "m.jsonl:2", "m.jsonl:3"]
    assert read(tmp_path / "m.jsonl", "\n") == []


def test_offset_and_duration_may_be_absent(tmp_path: Path) -> None:
    rows = [
        {"audio_filepath": "a.wav", "text": "ja", "offset": 1.5},
        {"audio_filepath": "b.wav", "text": "ja", "offset": 1.5, "duration": "2"},
        {"audio_filepath": "c.wav", "text": "ja", "duration": 2},
        {"audio_filepath": "d.wav", "text": "ja", "duration": None},
    ]
    found = good(tmp_path / "m.jsonl", "\n".join(map(json.dumps, rows)))
    assert [(u.id, u.start, u.seconds, u.promised_seconds) for u in found] == [
        ("a-00001500", 1.5, None, None),
        ("b-00001500", 1.5, 2.0, None),
        ("c", 0.0, None, 2.0),
        ("d", 0.0, None, None),
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_is_read_as_lines_are(tmp_path: Path, encoding: str, indent: int | None) -> None:
    rows = [GOOD | {"text": "één"}, GOOD | {"audio_filepath": "b.wav", "text": None}]
    text = json.dumps(rows, indent=indent, ensure_ascii=False)
    first, second = read(tmp_path / "m.json", text.encode(encoding))
    assert isinstance(first, Utterance) and (first.id, first.text) == ("a", "één")
    assert isinstance(second, Rejection) and second.id == "m.json:item 2"
    with pytest.raises(ValueError, match=r"m\.json: begins with \[ and is not a JSON array"):
        read(tmp_path / "m.json", text[:-5])


def test_manifests_of_several_folders_with_the_same_names(tmp_path: Path) -> None:
    manifests = [tmp_path / f"{name}/m.jsonl" for name in ("radio", "tv", "tv/late")]
    for manifest in manifests:
        manifest.parent.mkdir()
        manifest.write_text(json.dumps(GOOD))
    root = common_folder(manifests)
    assert root == tmp_path
    found = [line for manifest in manifests for line in read_json_lines(manifest, "train", root)]
    assert len({line.id for line in found}) == 3
    assert [line.id.rpartition("-")[0] for line in found] == ["radio-a", "tv-a", "tv-late-a"]
    (alone,) = read_json_lines(manifests[0], "train", common_folder(manifests[:1]))
    assert alone.id == "a"
