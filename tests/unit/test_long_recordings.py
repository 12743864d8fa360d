"""`python -m icetransfer.long_recordings`: what it reads, writes, skips and refuses."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from icetransfer import long_recordings
from icetransfer.data.long.cutting import Limits, Piece
from icetransfer.data.long.ledger import Ledger, LongRecording
from icetransfer.data.readers.folder import read_folder
from icetransfer.data.readers.tables import read_table
from icetransfer.data.utterances import Utterance
from icetransfer.long_recordings import (
    Aligner,
    cut_all,
    find_recordings,
    make_aligner,
    without_chance,
)
from icetransfer.model.checkpoint import save_checkpoint
from icetransfer.model.transducer import SIZES, build_transducer
from tests.unit.data.long.acting import NORMALIZER, make_tokenizer, read, sentences

LIMITS = Limits(2.0, 20.0, 0.4)
TOKENIZER = make_tokenizer()
SAID = [f'Hij zei: "{sentence}"' for sentence in sentences(12)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two recordings of the same, and the texts of them; of the second, another."""
    recordings = tmp_path / "boek"
    recordings.mkdir()
    seconds = read(TOKENIZER, SAID).heard.frames * 0.04
    noise = np.random.default_rng(0).normal(0, 0.1, round(16000 * seconds))
    for name, said in (("een", SAID), ("twee", ["Heel wat anders.", "Kwam xylofoon."])):
        soundfile.write(recordings / f"{name}.flac", noise, 16000)
        (recordings / f"{name}.txt").write_text("\n".join(said), encoding="utf-8")
    return recordings


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A model that hears the same in all recordings; where it was asked to put posteriors."""
    asked: list[Path] = []

    def hear(model, pieces, where, done):
        asked.append(where)
        return read(TOKENIZER, SAID).heard

    monkeypatch.setattr(long_recordings, "hear", hear)
    return asked


def run(folder: Path, out: Path, copies: bool = False, **inputs: str):
    aligner = Aligner(None, TOKENIZER, NORMALIZER)
    recordings, _ = find_recordings([folder])
    return cut_all(aligner, recordings, LIMITS, Ledger(out, inputs, copies), copies)


def test_a_recipe_reads_what_is_written(folder: Path, calls, tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    found, problems = run(folder, out)
    assert not problems
    assert [f.kept_words for f in found] == [12 * 12, 0]
    utterances = [*read_folder(out, 0)]
    assert all(isinstance(u, Utterance) for u in utterances)
    assert " ".join(u.text for u in utterances) == " ".join(SAID)
    assert {u.path.resolve() for u in utterances} == {folder.resolve() / "een.flac"}
    assert len({u.id for u in utterances}) == len(utterances) > 2
    ends = [u.start + u.seconds for u in utterances]
    assert all(end <= u.start for end, u in zip(ends, utterances[1:], strict=False))
    rejected = [*read_table(out / "rejected.tsv", ["path", "reason", "text", "heard"])]
    assert "Heel wat anders. Kwam xylofoon." in " ".join(row["text"] for row in rejected)
    assert "144 of 149 words" in (out / "summary.md").read_text(encoding="utf-8")


def test_next_to_nothing_of_a_recording_is_nothing() -> None:
    kept, lost = Piece(5, 8, "de hond", 0.5), Piece(10, 90, "x" * 200, None, "not heard")
    (first, second) = without_chance([kept, lost], 100)
    assert first == kept._replace(reason="hardly anything else of the text was found")
    assert second == lost
    assert without_chance([kept, lost], 50) == [kept, lost]  # much of the recording
    short = lost._replace(text="x")
    assert without_chance([kept, short], 100) == [kept, short]  # much of the text


def test_copies_are_files_of_their_own(folder: Path, calls, tmp_path: Path) -> None:
    (found, _), _ = run(folder, tmp_path / "corpus", copies=True)
    utterances = [*read_folder(tmp_path / "corpus", 0)]
    assert len(utterances) == len(found.utterances)
    whole, _ = soundfile.read(folder / "een.flac")
    for utterance, piece in zip(utterances, found.utterances, strict=True):
        assert utterance.seconds is None
        samples, rate = soundfile.read(utterance.path)
        first = round(16000 * piece.start)
        assert rate == 16000
        np.testing.assert_allclose(samples, whole[first : first + len(samples)], atol=1e-4)
        assert len(samples) == pytest.approx(16000 * (piece.end - piece.start), abs=1)


def test_what_is_done_is_skipped_until_something_changes(folder, calls, tmp_path) -> None:
    out = tmp_path / "corpus"
    run(folder, out)
    table = (out / "transcripts.tsv").read_bytes()
    run(folder, out)
    assert len(calls) == 2
    assert (out / "transcripts.tsv").read_bytes() == table
    (folder / "twee.txt").write_text("\n".join(SAID), encoding="utf-8")
    run(folder, out)
    assert len(calls) == 3
    run(folder, out, checkpoint="another")
    assert len(calls) == 5


def test_one_that_fails_costs_no_other(folder, calls, tmp_path) -> None:
    (folder / "broken.mp3").write_bytes(b"nothing")
    (folder / "broken.txt").write_text("iets", encoding="utf-8")
    (folder / "een.txt").write_text("кошка", encoding="utf-8")
    soundfile.write(folder / "stereo.flac", np.zeros((16000, 2)), 16000)
    (folder / "stereo.txt").write_text("iets", encoding="utf-8")
    found, problems = run(folder, tmp_path / "corpus")
    assert [f.path for f in found] == ["../boek/twee.flac"]
    assert len(problems) == 3
    assert "broken.mp3 cannot be read as audio" in problems[0]
    assert "does not look like Dutch" in problems[1]
    assert "has 2 channels" in problems[2] and "--copy" in problems[2]


def test_recordings_of_a_table(folder: Path) -> None:
    table = folder / "all.tsv"
    lines = ["path\ttext\tspeaker", "een.flac\ttwee.txt\tanna", "weg.flac\teen.txt", "een.flac"]
    table.write_text("\n".join(lines), encoding="utf-8")
    found, problems = find_recordings([table])
    assert found == [LongRecording(folder / "een.flac", folder / "twee.txt", "anna")]
    assert "all.tsv:4: expected path, text file" in problems[0] or "all.tsv:4" in problems[1]
    assert any("weg.flac does not exist" in problem for problem in problems)


def test_recordings_without_text(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", np.zeros(100), 16000)
    with pytest.raises(ValueError, match=r"a.txt does not exist; write what is said"):
        find_recordings([tmp_path])
    with pytest.raises(ValueError, match="no recordings in"):
        (tmp_path / "leeg").mkdir()
        find_recordings([tmp_path / "leeg"])


def test_models_that_cannot_align(tmp_path: Path) -> None:
    bpe = tmp_path / "bpe.model"
    bpe.write_bytes(TOKENIZER._processor.serialized_model_proto())
    checkpoint = tmp_path / "model.pt"
    args = argparse.Namespace(exp=None, checkpoint=checkpoint, tokenizer=bpe, language="nl")
    dims = replace(SIZES["tiny"], vocab_size=TOKENIZER.vocab_size)
    save_checkpoint(checkpoint, build_transducer(replace(dims, use_ctc=False)))
    with pytest.raises(ValueError, match=r"no CTC head.*Fine-tune it with a recipe"):
        make_aligner(args)
    save_checkpoint(checkpoint, build_transducer(replace(dims, vocab_size=99)))
    with pytest.raises(ValueError, match="it is another model's"):
        make_aligner(args)
    args.language = None
    with pytest.raises(ValueError, match="give --exp DIR, or"):
        make_aligner(args)
