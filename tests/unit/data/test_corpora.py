"""The folder corpus: every bad input is named and costs the others nothing."""

import gzip
import hashlib
import json
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from icetransfer.data import corpora
from icetransfer.data.corpora import Source, check_part, prepare_manifests
from icetransfer.data.leaks import without_duplicates
from icetransfer.data.readers.folder import read_folder
from icetransfer.data.recordings import Limits
from icetransfer.data.synthetic import speech
from icetransfer.data.text import normalizer
from icetransfer.data.utterances import SPLITS, Rejection, Utterance
from icetransfer.settings.corpora import FolderCorpus, JsonLines, SyntheticCorpus

Prepared = dict[str, list[dict[str, Any]]]


def folder_source(folder: Path, language: str = "nl", holdout_every: int = 0) -> Source:
    corpus = FolderCorpus(kind="folder", path=folder, holdout_every=holdout_every)
    return Source("corpus", corpus, folder, language, Limits(0.5, 30.0))


def prepare_folder(
    folder: Path, out: Path, language: str = "nl", holdout_every: int = 0
) -> tuple[Prepared, list[list[str]]]:
    """The cuts by split, and the lines of what was rejected."""
    prepare_manifests(folder_source(folder, language, holdout_every), out)
    cuts = {split: manifest(out / f"corpus_{split}.jsonl.gz") for split in SPLITS}
    lines = (out / "corpus_rejected.tsv").read_text().splitlines()[1:]
    return cuts, [line.split("\t") for line in lines]


def write_audio(path: Path, seconds: float = 1.0, rate: int = 16000, channels: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(1).normal(0, 0.1, (round(seconds * rate), channels))
    soundfile.write(path, noise, rate)


def write_transcripts(folder: Path, *lines: str) -> None:
    (folder / "transcripts.tsv").write_text("".join(line + "\n" for line in lines))


def manifest(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as lines:
        return [json.loads(line) for line in lines]


def missing(path: Path) -> None:
    pass


def empty(path: Path) -> None:
    path.write_bytes(b"")


def not_audio(path: Path) -> None:
    path.write_text("this is no audio")


def truncated(path: Path) -> None:
    write_audio(path, 3.0)
    path.write_bytes(path.read_bytes()[:20000])


def damaged(path: Path) -> None:
    write_audio(path, 3.0)
    data = bytearray(path.read_bytes())
    data[10000:60000] = bytes(50000)
    path.write_bytes(data)


def silent(path: Path) -> None:
    soundfile.write(path, np.zeros(16000), 16000)


def stereo(path: Path) -> None:
    write_audio(path, channels=2)


def short(path: Path) -> None:
    write_audio(path, 0.25)


def long(path: Path) -> None:
    write_audio(path, 31.0)


def good(path: Path) -> None:
    write_audio(path)


@pytest.mark.parametrize(
    ("make", "text", "reason"),
    [
        (missing, "ja", "no such file"),
        (empty, "ja", "empty file"),
        (not_audio, "ja", "not readable as audio"),
        (truncated, "ja", "truncated|not readable"),
        (damaged, "ja", "truncated|not readable"),
        (silent, "ja", "digital silence"),
        (stereo, "ja", "2 channels"),
        (short, "ja", "too short: 0.250 s, the limit is 0.5 s"),
        (long, "ja", "too long: 31.000 s, the limit is 30 s"),
        (good, "", "empty transcript"),
        (good, " ... ", "empty transcript"),
        (good, "kamer ☎ 12", "train text outside the Dutch alphabet: ☎"),
    ],
)
def test_bad_recording_is_named_and_costs_no_other(
    tmp_path: Path, make: Callable[[Path], None], text: str, reason: str
) -> None:
    write_audio(tmp_path / "a.flac")
    write_audio(tmp_path / "c.flac")
    make(tmp_path / "b.flac")
    write_transcripts(tmp_path, "a.flac\tJa.\tx", f"b.flac\t{text}\tx", "c.flac\tnee\tx")
    prepare_manifests(folder_source(tmp_path), tmp_path / "manifests")
    cuts = manifest(tmp_path / "manifests/corpus_train.jsonl.gz")
    assert [cut["id"] for cut in cuts] == ["a", "c"]
    header, line = (tmp_path / "manifests/corpus_rejected.tsv").read_text().splitlines()
    assert header.split("\t") == ["id", "path", "reason", "advice"]
    identity, path, given, advice = line.split("\t")
    assert (identity, path) == ("b", str(tmp_path / "b.flac"))
    assert any(part in given for part in reason.split("|"))
    assert advice


def test_the_characters_that_cost_sentences_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in "abc":
        write_audio(tmp_path / f"{name}.flac")
    write_transcripts(tmp_path, "a.flac\tja ☎ ☃\tx", "b.flac\tnee ☎\tx", "c.flac\tja\tx")
    with caplog.at_level("WARNING", "icetransfer"):
        prepare_manifests(folder_source(tmp_path), tmp_path / "manifests")
    assert "corpus: 2 left out: train text outside the Dutch alphabet" in caplog.text
    assert "these characters cost recordings: ☎ 2, ☃ 1" in caplog.text


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"b.flac", "1 tab-separated columns"),
        (b"b.flac\tja\tx\ttrain\tmore", "5 tab-separated columns"),
        (b"b.flac\tja\tx\tvalid", "split 'valid'"),
        (b"b.flac\tj\xe9\tx", "not UTF-8"),
        (b"a.flac\tja\tx", "duplicate id"),
    ],
)
def test_bad_line_is_named_with_its_number(tmp_path: Path, line: bytes, reason: str) -> None:
    (tmp_path / "transcripts.tsv").write_bytes(b"a.flac\tja\tx\n" + line + b"\nc.flac\tja\tx\n")
    found = list(without_duplicates(read_folder(tmp_path, 0)))
    assert [u.id for u in found if isinstance(u, Utterance)] == ["a", "c"]
    where = "a" if reason == "duplicate id" else "transcripts.tsv:2"
    assert [(r.id, r.reason) for r in found if isinstance(r, Rejection)] == [(where, reason)]


def test_test_text_is_never_dropped(tmp_path: Path) -> None:
    write_audio(tmp_path / "a.flac", 0.4)
    write_audio(tmp_path / "b.flac", 31.0)
    write_audio(tmp_path / "c.flac", 0.2)
    write_transcripts(tmp_path, "a.flac\tKamer 12\tx", "b.flac\tja ☎\tx", "c.flac\tja\tx")
    cuts, rejected = prepare_folder(tmp_path, tmp_path / "out", holdout_every=1)
    texts = [cut["supervisions"][0]["text"] for cut in cuts["test"]]
    assert texts == ["kamer twaalf", "ja ☎"]
    assert [row[2] for row in rejected] == ["too short: 0.200 s, the limit is 0.29 s"]


def test_holdout_header_and_own_split(tmp_path: Path) -> None:
    lines = [f"{n}.flac\tja\tx" for n in range(20)]
    lines[3] += "\tdev"
    write_transcripts(tmp_path, "path\ttext\tspeaker", *lines)
    utterances = list(read_folder(tmp_path, 10))
    assert all(isinstance(utterance, Utterance) for utterance in utterances)
    splits = {split: [u.id for u in utterances if u.split == split] for split in SPLITS}
    assert splits["test"] == ["8", "13", "19"], "by their names"
    assert "3" in splits["dev"], "by its own column"
    assert {u.split for u in read_folder(tmp_path, 0)} == {"train", "dev"}


def test_nothing_left_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    write_transcripts(tmp_path, "a.flac\tja\tx")
    with pytest.raises(ValueError, match=r"none of its 1 recordings.*a\.flac: no such file"):
        prepare_folder(tmp_path, tmp_path / "out")
    write_transcripts(tmp_path)
    with pytest.raises(ValueError, match=r"none of its 0 recordings .* is empty"):
        prepare_folder(tmp_path, tmp_path / "out")
    (tmp_path / "transcripts.tsv").unlink()
    with pytest.raises(ValueError, match="does not exist: expected path, text, speaker"):
        prepare_folder(tmp_path, tmp_path / "out")


def test_text_is_normalised_and_the_original_kept(tmp_path: Path) -> None:
    write_audio(tmp_path / "sub/a.flac")
    write_transcripts(tmp_path, "sub/a.flac\t’s Ochtends: ja!\tanna")
    (cut,) = prepare_folder(tmp_path, tmp_path / "out")[0]["train"]
    supervision = cut["supervisions"][0]
    assert cut["id"] == "sub-a-" + hashlib.sha256(b"sub/a").hexdigest()[:8]
    assert supervision["text"] == "'s ochtends ja"
    assert supervision["custom"] == {"raw_text": "’s Ochtends: ja!"}
    assert (supervision["speaker"], supervision["language"]) == ("anna", "nl")


def test_what_was_done_to_the_text_is_reported_and_doubts_are_left_out(tmp_path: Path) -> None:
    texts = ["Het is 5 km.", "Ook 5 km, [gelach] ja", "Foo XIV", "hij zei <unk> ja", "漢字", ""]
    for number in range(len(texts)):
        write_audio(tmp_path / f"{number}.flac")
    write_audio(tmp_path / "t.flac")
    lines = [f"{number}.flac\t{words}\tx\ttrain" for number, words in enumerate(texts)]
    write_transcripts(tmp_path, *lines, "t.flac\tLaan XIV\tx\ttest")
    cuts, rejected = prepare_folder(tmp_path, tmp_path / "out", holdout_every=0)
    assert [cut["id"] for cut in cuts["train"]] == ["0", "1"]
    assert [cut["supervisions"][0]["text"] for cut in cuts["test"]] == ["laan veertien"]
    reason = "train text of which it is not sure what was said: a Roman numeral: XIV"
    assert [row[0] for row in rejected] == ["2", "3", "4", "5"] and rejected[0][2] == reason
    page = (tmp_path / "out/corpus_text.md").read_text(encoding="utf-8")
    assert "| 2 | XIV | veertien | Foo XIV |" in page
    assert "| 1 | 5 km. | vijf kilometer | Het is 5 km. |" in page
    assert "| 1 | not sure what was said: a Roman numeral | Foo XIV |" in page
    assert "| 1 | not sure what was said: speech that is not written down | hij zei" in page
    assert "| 1 | [gelach] |" in page and "| 1 | empty transcript |" in page


@pytest.mark.parametrize("rate", [8000, 22050, 44100])
def test_other_rates_are_resampled_when_read(tmp_path: Path, rate: int) -> None:
    from lhotse import CutSet

    path = tmp_path / "a.wav"
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate), rate)
    write_transcripts(tmp_path, "a.wav\tja\tx")
    prepare_manifests(folder_source(tmp_path), tmp_path)
    (cut,) = CutSet.from_jsonl_lazy(tmp_path / "corpus_train.jsonl.gz")
    samples = cut.load_audio()
    assert samples.shape == (1, 32000)
    peak = np.abs(np.fft.rfft(samples[0])).argmax() / 2  # a bin is half a hertz
    assert peak == pytest.approx(440, abs=1)


def test_same_bytes_again_and_skipped_when_complete(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        write_audio(tmp_path / f"{name}.flac")
    write_transcripts(tmp_path, "a.flac\tja\tx", "b.flac\tnee\ty", "c.flac\t\tx")
    first, second = tmp_path / "first", tmp_path / "second"
    prepare_manifests(folder_source(tmp_path), first)
    prepare_manifests(folder_source(tmp_path), second)
    content = {path.name: path.read_bytes() for path in first.iterdir()}
    assert content == {path.name: path.read_bytes() for path in second.iterdir()}
    assert set(content) == {
        "corpus_train.jsonl.gz", "corpus_dev.jsonl.gz", "corpus_test.jsonl.gz",
        "corpus_rejected.tsv", "corpus_prepared.json", "corpus_audio.jsonl.gz", "corpus_text.md",
    }  # fmt: skip

    (first / "corpus_rejected.tsv").write_text("untouched")
    prepare_manifests(folder_source(tmp_path), first)
    assert (first / "corpus_rejected.tsv").read_text() == "untouched"
    write_transcripts(tmp_path, "a.flac\tja\tx")
    prepare_manifests(folder_source(tmp_path), first)
    assert len(manifest(first / "corpus_train.jsonl.gz")) == 1
    with caplog.at_level("INFO", "icetransfer"):
        prepare_manifests(folder_source(tmp_path), first)
        monkeypatch.setattr(normalizer, "_checksum", lambda path: "of edited rules")
        prepare_manifests(folder_source(tmp_path), first)
    assert "manifests of corpus are complete" in caplog.text
    assert "changed since its manifests: text rules; checking again" in caplog.text


def test_synthetic_corpus(tmp_path: Path) -> None:
    corpus = SyntheticCorpus(kind="synthetic")
    source = Source("slots", corpus, tmp_path, "pl", Limits(0.5, 30.0))
    with pytest.raises(ValueError, match="does not exist: run stage 0"):
        prepare_manifests(source, tmp_path / "manifests")
    minutes = {"train": 0.1, "dev": 0.05, "test": 0.05}
    speech.synthesise("pl", "slots", minutes, tmp_path)
    prepare_manifests(source, tmp_path / "manifests")
    for split, wanted in minutes.items():
        cuts = manifest(tmp_path / f"manifests/slots_{split}.jsonl.gz")
        assert sum(cut["duration"] for cut in cuts) >= 60 * wanted
        assert all(cut["supervisions"][0]["text"] for cut in cuts)
    # What is replaced is seen, and what is no audio costs no other.
    path = tmp_path / "manifests/slots_train.jsonl.gz"
    before, cuts = path.read_bytes(), manifest(path)
    first = Path(cuts[0]["recording"]["sources"][0]["source"])
    samples, rate = soundfile.read(first, dtype="int16")
    soundfile.write(first, samples[::-1], rate)
    prepare_manifests(source, tmp_path / "manifests")
    assert path.read_bytes() != before, "by which stage 2 sees it"
    first.write_text("no audio")
    prepare_manifests(source, tmp_path / "manifests")
    assert len(manifest(path)) == len(cuts) - 1
    assert "not readable" in (tmp_path / "manifests/slots_rejected.tsv").read_text()


@pytest.mark.parametrize(
    ("name", "language", "holdout_every", "kept", "rejected"),
    [
        ("nl_nathalie", "nl", 10, (893, 124, 113), 0),
        ("it_asterisk_carlo", "it", 10, (367, 55, 48), 31),
        ("en_commonvoice100", "en", 1, (0, 0, 100), 0),
        ("en_fleurs10", "en", 1, (0, 0, 10), 0),
        ("es_fleurs10", "es", 1, (0, 0, 10), 0),
        ("fr_fleurs10", "fr", 1, (0, 0, 10), 0),
        ("pt_fleurs10", "pt", 1, (0, 0, 10), 0),
        ("es_fleurs10", "es", 0, (10, 0, 0), 0),
        ("pt_fleurs10", "pt", 0, (10, 0, 0), 0),
        ("xx_picovoice", "en", 1, (0, 0, 8), 0),
    ],
)
def test_real_recordings(
    speech_dir: Path,
    tmp_path: Path,
    name: str,
    language: str,
    holdout_every: int,
    kept: tuple[int, int, int],
    rejected: int,
) -> None:
    cuts, rejections = prepare_folder(speech_dir / name, tmp_path, language, holdout_every)
    assert tuple(len(cuts[split]) for split in SPLITS) == kept
    assert len(rejections) == rejected


def test_a_killed_run_goes_on_and_gives_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora, "PART", 3)
    for number in range(10):
        write_audio(tmp_path / f"{number}.flac")
    write_transcripts(tmp_path, *[f"{n}.flac\t{'ja' if n % 4 else ''}\tx" for n in range(10)])
    source = folder_source(tmp_path)
    prepare_manifests(source, tmp_path / "whole")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}

    checked: list[str] = []

    def check_and_die(part: list[Any], *arguments: Any) -> None:
        check_part(part, *arguments)
        checked.append(part[0].id)
        if len(checked) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(corpora, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(corpora, "check_part", check_and_die)
    with pytest.raises(KeyboardInterrupt):
        prepare_manifests(source, tmp_path / "killed")
    (tmp_path / "killed/corpus_parts/.1.partial.000002.jsonl.gz").write_bytes(b"half")
    prepare_manifests(source, tmp_path / "killed")
    assert checked == ["0", "3", "6", "9"], "a part was checked twice, or not"
    files = {path.name: path.read_bytes() for path in (tmp_path / "killed").iterdir()}
    assert files == expected


class InThisProcess:
    """A pool of processes that has none."""

    def __init__(self, jobs: int, initializer: Callable[[], None]) -> None:
        pass

    def __enter__(self) -> "InThisProcess":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, function: Callable[..., None], *arguments: Any) -> Future[None]:
        future: Future[None] = Future()
        future.set_result(function(*arguments))
        return future


def test_names_that_differ_in_a_slash_are_different_recordings(tmp_path: Path) -> None:
    names = ["boek/1.flac", "boek-1.flac", "boek/1/1.flac", "boek-1/1.flac"]
    for number, name in enumerate(names):
        write_audio(tmp_path / name, 1.0 + number)
    write_transcripts(tmp_path, *[f"{name}\tja\tx" for name in names])
    cuts, rejected = prepare_folder(tmp_path, tmp_path / "out")
    assert rejected == []
    assert [cut["duration"] for cut in cuts["train"]] == [1.0, 2.0, 3.0, 4.0]
    assert len({cut["id"] for cut in cuts["train"]}) == 4
    assert cuts["train"][1]["id"] == "boek-1", "as ever where there is no folder"


def json_lines_source(tmp_path: Path, **manifests: list[Path]) -> Source:
    given = {split: tuple(paths) for split, paths in manifests.items()}
    corpus = JsonLines(kind="jsonl", **given)  # type: ignore[arg-type]
    return Source("corpus", corpus, tmp_path, "nl", Limits(0.5, 30.0))


def nemo_manifest(folder: Path, seconds: float) -> Path:
    """A manifest of one file, whose name is the same in every folder."""
    write_audio(folder / "wav/1.flac", seconds)
    line = {"audio_filepath": "wav/1.flac", "duration": seconds, "text": "ja"}
    (folder / "m.jsonl").write_text(json.dumps(line))
    return folder / "m.jsonl"


def test_manifests_of_several_folders_keep_their_test_set(tmp_path: Path) -> None:
    given = [nemo_manifest(tmp_path / name, n) for n, name in enumerate(("tv", "radio", "hal"), 1)]
    source = json_lines_source(tmp_path, train=given[:1], dev=given[1:2], test=given[2:])
    prepare_manifests(source, tmp_path / "out")
    for split, seconds in zip(SPLITS, (1.0, 2.0, 3.0), strict=True):
        (cut,) = manifest(tmp_path / f"out/corpus_{split}.jsonl.gz")
        assert cut["duration"] == seconds
    assert len((tmp_path / "out/corpus_rejected.tsv").read_text().splitlines()) == 1


def test_a_test_set_of_which_nothing_is_left_is_an_error(tmp_path: Path) -> None:
    train, test = nemo_manifest(tmp_path / "a", 1.0), nemo_manifest(tmp_path / "b", 2.0)
    source = json_lines_source(tmp_path, train=[train], test=[test])
    data = (tmp_path / "b/wav/1.flac").read_bytes()
    (tmp_path / "b/wav/1.flac").unlink()
    with pytest.raises(
        ValueError,
        match=r"no recording of it is for test; 1 of the corpus are left out; the first: \S+"
        r"1\.flac: no such file \(.*take the split out of data\.corpora",
    ):
        prepare_manifests(source, tmp_path / "out")
    assert "no such file" in (tmp_path / "out/corpus_rejected.tsv").read_text()
    (tmp_path / "b/wav/1.flac").write_bytes(data)
    prepare_manifests(source, tmp_path / "out")
    assert len(manifest(tmp_path / "out/corpus_test.jsonl.gz")) == 1, "what was brought is seen"


def test_a_folder_too_small_to_hold_out_of_says_what_to_do(tmp_path: Path) -> None:
    for name in "abc":
        write_audio(tmp_path / f"{name}.flac")
    lines = [f"{name}.flac\tja\tx" for name in "abc"]
    write_transcripts(tmp_path, *lines)
    with pytest.raises(ValueError, match=r"for dev\. To go on, .*set holdout_every"):
        prepare_folder(tmp_path, tmp_path / "out", holdout_every=10)
    write_transcripts(tmp_path, lines[0], lines[1] + "\tdev", lines[2] + "\ttest")
    cuts, _ = prepare_folder(tmp_path, tmp_path / "out", holdout_every=10)
    assert [len(cuts[split]) for split in SPLITS] == [1, 1, 1]


def test_nothing_in_a_table_ends_the_stage(tmp_path: Path) -> None:
    write_audio(tmp_path / "a.flac")
    soundfile.write(tmp_path / "nan.wav", np.full(16000, np.nan, np.float32), 16000, "FLOAT")
    names = ["x" * 400 + ".flac", "b\0c.flac", "nan.wav", ".", "../", "/", "é.flac", "a.flac"]
    write_transcripts(tmp_path, *[f"{name}\tja\tx" for name in names])
    cuts, rejected = prepare_folder(tmp_path, tmp_path / "out")
    assert [cut["id"] for cut in cuts["train"]] == ["a"]
    assert len(rejected) == len(names) - 1
    assert all(len(row) == 4 for row in rejected)
    assert rejected[2][2] == "samples that are not finite (NaN or infinity)"
