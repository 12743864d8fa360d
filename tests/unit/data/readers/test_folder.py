"""transcripts.tsv as people write it: headers, quoting, encodings, ids."""

from __future__ import annotations

import codecs
import gzip
from pathlib import Path

import pytest

from icetransfer.data.readers.folder import read_folder
from icetransfer.data.readers.tables import read_lines
from icetransfer.data.utterances import Rejection, Utterance, id_of_path

Row = tuple[str, str, str, str]


def read(folder: Path, content: str | bytes) -> list[Utterance | Rejection]:
    data = content.encode() if isinstance(content, str) else content
    (folder / "transcripts.tsv").write_bytes(data)
    return list(read_folder(folder, 0))


def rows(folder: Path, content: str | bytes) -> list[Row]:
    """Path below the folder, text, speaker and split of each line; none may be wrong."""
    found: list[Row] = []
    for utterance in read(folder, content):
        assert isinstance(utterance, Utterance), utterance
        name = utterance.path.relative_to(folder).as_posix()
        found.append((name, utterance.text, utterance.speaker, utterance.split))
    return found


@pytest.mark.parametrize(
    "content",
    [
        "a.flac\tJa, ja\tanna\nb/c.flac\tnee\tjan\n",
        "path\ttext\tspeaker\na.flac\tJa, ja\tanna\nb/c.flac\tnee\tjan\n",
        "speaker_id\tfile\tsentence\nanna\ta.flac\tJa, ja\njan\tb/c.flac\tnee\n",
        "client_id\tpath\tsentence\tup_votes\nanna\ta.flac\tJa, ja\t2\njan\tb/c.flac\tnee\t3\n",
        "Audio Path\tduration\tTranscript\tSpeaker-ID\n"
        "a.flac\t1.0\tJa, ja\tanna\nb/c.flac\t1.0\tnee\tjan\n",
        '"audio"\t"text"\t"speaker"\n"a.flac"\t"Ja, ja"\t"anna"\n"b/c.flac"\t"nee"\t"jan"\n',
        "a.flac\tJa, ja\tanna\r\n\r\nb/c.flac\tnee\tjan\r\n",
        "a.flac\tJa, ja\tanna\rb/c.flac\tnee\tjan\r",
        "transcription\tfilename\tspk\tsplit\nJa, ja\ta.flac\tanna\t\nnee\tb/c.flac\tjan\ttrain\n",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_columns_and_encodings(tmp_path: Path, content: str, encoding: str) -> None:
    assert rows(tmp_path, content.encode(encoding)) == [
        ("a.flac", "Ja, ja", "anna", "train"), ("b/c.flac", "nee", "jan", "train"),
    ]  # fmt: skip


def test_utf_16_of_either_order_with_its_mark(tmp_path: Path) -> None:
    for mark, encoding in ((codecs.BOM_UTF16_BE, "utf-16-be"), (codecs.BOM_UTF16_LE, "utf-16-le")):
        content = mark + "é.flac\tÉén ☎\tx\n".encode(encoding)
        assert rows(tmp_path, content) == [("é.flac", "Één ☎", "x", "train")]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('a.flac\t"een\ttwee"\tx', "een\ttwee"),
        ('a.flac\t"Zij zei ""ja"""\tx', 'Zij zei "ja"'),
        ('a.flac\t"Ja," zei zij\tx', '"Ja," zei zij'),
        ('a.flac\tzij zei "ja"\tx', 'zij zei "ja"'),
        ('a.flac\t"Ja, zei zij\tx', '"Ja, zei zij'),
        ("a.flac\t'Ja'\u2028nee\x0b\tx", "'Ja'\u2028nee"),
    ],
)
def test_quotation_marks(tmp_path: Path, line: str, text: str) -> None:
    assert rows(tmp_path, f"{line}\nb.flac\tnee\tx\n") == [
        ("a.flac", text, "x", "train"), ("b.flac", "nee", "x", "train"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "where", "reason", "advice"),
    [
        ("a.flac\teen\ttwee\tdrie\tx", 1, "5 tab-separated columns", "has a tab between quotation"),
        ("a.flac\teen\ttwee\tx", 1, "split 'x'", "train, dev, test"),
        ("file\tsentence\na.flac\teen\ttwee\tdrie\tvier", 2, "5 tab", "path, text, speaker"),
        ("sentence\tfile\neen\ttwee\ta.flac", 2, "3 tab", "write 2, as the header has"),
        ("sentence\tfile\neen", 2, "1 tab", "write 2, as the header has"),
        ("sentence\tfile\neen\t", 2, "no path", "relative to the folder"),
        ('a.flac\t"een\ntwee"', 1, "a quotation mark in the last column", "on one line"),
        (b"a.flac\tj\xe9", 1, "not UTF-8", "save the file as UTF-8"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, content: str | bytes, where: int, reason: str, advice: str
) -> None:
    found = read(tmp_path, content)[0]
    assert isinstance(found, Rejection)
    assert found.id == f"transcripts.tsv:{where}"
    assert found.reason.startswith(reason)
    assert advice in found.advice


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("id\tsentence", r"transcripts\.tsv:1: no columns of the path .*id, sentence.*filename"),
        ("file\tduration", r"no columns of the text .*name one of them text.*sentence"),
        ("file\tpath\ttext", "2 columns of the path"),
    ],
)
def test_a_header_that_lacks_a_column_says_which(tmp_path: Path, header: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, f"{header}\na\tb\tc\n")


def test_a_recording_named_like_a_column_is_no_header(tmp_path: Path) -> None:
    (tmp_path / "audio").touch()
    assert rows(tmp_path, "audio\ttext\tx\n") == [("audio", "text", "x", "train")]


def test_a_broken_packed_file_is_a_mistake_that_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"line\n" * 9000)[:-20])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: cannot be unpacked after line"):
        list(read_lines(path))


def test_ids_carry_their_path() -> None:
    names = ["boek/1.flac", "boek-1.flac", "boek/1/1.flac", "boek-1/1.flac", "../boek/1.flac",
             "boek-1-1.flac", "-1.flac", "1.flac", "/boek/1.flac", ".1.flac"]  # fmt: skip
    ids = [id_of_path(name) for name in names]
    assert len(set(ids)) == len(names)
    assert not any("/" in identity or identity.startswith((".", "-")) for identity in ids)
    assert id_of_path("boek-1.flac") == "boek-1", "as ever where there is no folder"
    assert id_of_path("./1.flac") == "1"
    assert id_of_path("boek/1.flac") == "boek-1-dc1f7d4d"


def test_parts_of_a_file(tmp_path: Path) -> None:
    lines = ["een\t\t1.5", "twee\t1.5\t2", "drie\t3.5\t"]
    content = "path\ttext\toffset\tduration\n" + "\n".join(f"a.flac\t{line}" for line in lines)
    places = [(u.id, u.start, u.seconds) for u in read(tmp_path, content)]  # type: ignore[union-attr]
    assert places == [("a-00000000", 0, 1.5), ("a-00001500", 1.5, 2), ("a-00003500", 3.5, None)]


@pytest.mark.parametrize("place", ["-1\t2", "x\t2", "nan\t1", "1\t0", "1\tinf"])
def test_parts_that_are_none(tmp_path: Path, place: str) -> None:
    (found,) = read(tmp_path, f"path\ttext\toffset\tduration\na.flac\teen\t{place}\n")
    assert isinstance(found, Rejection)
    assert "write seconds from the file's beginning" in found.advice


def test_durations_of_whole_files_are_not_read(tmp_path: Path) -> None:
    (found,) = read(tmp_path, "path\ttext\tduration\na.flac\teen\t1.0\n")
    assert isinstance(found, Utterance)
    assert (found.start, found.seconds) == (0, None)
