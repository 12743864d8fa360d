"""lhotse's cuts as people save them, and audio behind commands and URLs that gives none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from lhotse import AudioSource, CutSet, MonoCut, Recording, SupervisionSegment

from icetransfer.data.readers import cuts
from icetransfer.data.readers.cuts import read_cuts
from icetransfer.data.readers.tables import common_folder
from icetransfer.data.utterances import Rejection, Utterance, with_audio

RATE = 16_000
Found = list[Utterance | Rejection]


def noise(seconds: float) -> Any:
    return np.random.default_rng(1).normal(0, 0.1, round(seconds * RATE))


def supervision(name: str, start: float, seconds: float, text: Any = None) -> SupervisionSegment:
    return SupervisionSegment(name, "r", start, seconds, text=text or name, speaker="anna")


def cut(
    identity: str,
    source: AudioSource,
    *supervisions: SupervisionSegment,
    seconds: float = 10.0,
    **fields: Any,
) -> MonoCut:
    recording = Recording("r", [source], RATE, round(seconds * RATE), seconds)
    given = {"start": 0.0, "duration": seconds, "channel": source.channels[0]} | fields
    return MonoCut(identity, supervisions=list(supervisions), recording=recording, **given)


def read(folder: Path, *cuts: MonoCut) -> Found:
    CutSet.from_cuts(cuts).to_file(folder / "cuts.jsonl")
    return list(
        map(with_audio, read_cuts(folder / "cuts.jsonl", "train", folder / "audio", folder))
    )


def test_several_supervisions_are_utterances_of_their_own(tmp_path: Path) -> None:
    source = AudioSource("file", [0], str(tmp_path / "a.wav"))
    several = cut("several", source, supervision("b", 5, 2), supervision("a", 1, 3))
    inside = cut("inside", source, supervision("c", 1, 3), start=2.0, duration=6.0)
    filled = cut("filled", source, supervision("d", 0.3, 9.4))
    found = read(tmp_path, several, inside, filled)
    assert [(u.id, u.text, u.start, u.seconds) for u in found if isinstance(u, Utterance)] == [
        ("several-a", "a", 1.0, 3.0),
        ("several-b", "b", 5.0, 2.0),
        ("inside", "c", 3.0, 3.0),
        ("filled", "d", 0.0, 10.0),
    ]


def test_overlapping_and_partial_supervisions_are_named(tmp_path: Path) -> None:
    source = AudioSource("file", [0], str(tmp_path / "a.wav"))
    several = cut(
        "several", source, supervision("a", 0, 4), supervision("b", 1, 1), supervision("c", 3, 3),
        supervision("d", 5.95, 1), supervision("e", 8, 3), supervision("f", 7, 1),
    )  # fmt: skip
    early = cut("early", source, supervision("g", -1, 3), start=2.0, duration=5.0)
    silent = cut("silent", source)
    found = read(tmp_path, several, early, silent)
    assert [line.id for line in found if isinstance(line, Utterance)] == ["several-d", "several-f"]
    assert [(line.id, line.reason) for line in found if isinstance(line, Rejection)] == [
        ("several-a", "supervision a overlaps b"),
        ("several-b", "supervision b overlaps a"),
        ("several-c", "supervision c overlaps a"),
        ("several-e", "supervision e reaches out of its cut: 8 to 11 s of 10 s"),
        ("early", "supervision g reaches out of its cut: -1 to 2 s of 5 s"),
        ("silent", "empty transcript"),
    ]
    wrong = [line.path for line in found if isinstance(line, Rejection)]
    assert wrong == [f"{tmp_path}/cuts.jsonl:{number}" for number in (1, 1, 1, 1, 2, 3)]


def test_channels(tmp_path: Path) -> None:
    samples = np.stack([noise(2.0), noise(2.0) / 2], axis=1)
    soundfile.write(tmp_path / "two.wav", samples, RATE)
    soundfile.write(tmp_path / "one.wav", samples[:, 0], RATE)
    two, one = (str(tmp_path / f"{name}.wav") for name in ("two", "one"))
    spoken = supervision("s", 0, 2)
    found = read(
        tmp_path,
        cut("right", AudioSource("file", [0, 1], two), spoken, seconds=2.0, channel=1),
        cut("third", AudioSource("file", [0, 1], two), spoken, seconds=2.0, channel=2),
        cut("lost", AudioSource("file", [0, 1], one), spoken, seconds=2.0, channel=1),
    )
    right, third, lost = found
    assert isinstance(right, Utterance) and right.path == tmp_path / "audio/right.flac"
    assert soundfile.read(right.path)[0] == pytest.approx(samples[:, 1], abs=1e-4)
    assert isinstance(third, Rejection)
    assert third.reason == "channel 2, but the recording has 0, 1"
    assert isinstance(lost, Rejection)
    assert lost.reason == "its audio has nothing in channel 1"


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("command", "false"),
        ("command", "echo no audio"),
        ("command", "no-such-program"),
        ("url", "http://127.0.0.1:9/a.wav"),
    ],
)
def test_audio_that_does_not_come_ends_nothing(tmp_path: Path, kind: str, source: str) -> None:
    soundfile.write(tmp_path / "a.wav", noise(2.0), RATE)
    spoken = supervision("s", 0, 2)
    bad, good = read(
        tmp_path,
        cut("bad", AudioSource(kind, [0], source), spoken, seconds=2.0),
        cut("a/b", AudioSource("command", [0], f"cat {tmp_path}/a.wav"), spoken, seconds=2.0),
    )
    assert isinstance(bad, Rejection)
    assert (bad.id, bad.path) == ("bad", source)
    assert bad.reason.startswith(f"its {kind} gives no audio")
    assert "0x" not in bad.reason and "MonoCut" not in bad.reason
    assert isinstance(good, Utterance) and soundfile.info(good.path).frames == 2 * RATE


def test_a_command_that_never_ends_is_left(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cuts, "PATIENCE_SECONDS", 0.2)
    source = AudioSource("command", [0], "exec sleep 60")
    (found,) = read(tmp_path, cut("a", source, supervision("s", 0, 2), seconds=2.0))
    assert isinstance(found, Rejection)
    assert found.reason == "its command gives no audio (nothing came in 0.2 s)"


def test_samples_are_looked_at_before_they_are_written(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.full(2 * RATE, np.nan, np.float32), RATE, "FLOAT")
    source = AudioSource("command", [0], f"cat {tmp_path}/a.wav")
    (found,) = read(tmp_path, cut("a", source, supervision("s", 0, 2), seconds=2.0))
    assert isinstance(found, Rejection)
    assert "not finite" in found.reason
    assert not (tmp_path / "audio").exists()


def test_audio_that_was_written_follows_what_it_is_written_from(tmp_path: Path) -> None:
    levels = {}
    for name in ("a", "b"):
        samples = np.stack([noise(2.0), noise(2.0)[::-1]], axis=1)
        soundfile.write(tmp_path / f"{name}.wav", samples if name == "a" else samples / 4, RATE)
    spoken = supervision("s", 0, 2)

    def written(source: AudioSource) -> float:
        (found,) = read(tmp_path, cut("x", source, spoken, seconds=2.0))
        assert isinstance(found, Utterance)
        return float(np.std(soundfile.read(found.path)[0]))

    for name in ("a", "b"):
        soundfile.write(tmp_path / f"{name}-mono.wav", noise(2.0) / (1 if name == "a" else 4), RATE)
        levels[name] = written(AudioSource("command", [0], f"cat {tmp_path}/{name}-mono.wav"))
    assert levels["b"] < levels["a"] / 3, "another command"
    first = written(AudioSource("file", [0, 1], str(tmp_path / "a.wav")))
    before = (tmp_path / "audio/x.flac").stat().st_mtime_ns
    assert written(AudioSource("file", [0, 1], str(tmp_path / "a.wav"))) == first
    assert (tmp_path / "audio/x.flac").stat().st_mtime_ns == before, "nothing changed"
    (tmp_path / "b.wav").replace(tmp_path / "a.wav")
    assert written(AudioSource("file", [0, 1], str(tmp_path / "a.wav"))) < first / 3, "replaced"


def test_cuts_of_several_folders_with_the_same_ids(tmp_path: Path) -> None:
    source = AudioSource("file", [0], str(tmp_path / "a.wav"))
    manifests = [tmp_path / f"{name}/cuts.jsonl" for name in ("tv", "radio", "radio/late")]
    for manifest in manifests:
        manifest.parent.mkdir()
        CutSet.from_cuts([cut("x", source, supervision("s", 0, 10))]).to_file(manifest)
    root = common_folder(manifests)
    found = [line for m in manifests for line in read_cuts(m, "train", tmp_path / "audio", root)]
    assert [line.id.rpartition("-")[0] for line in found] == ["tv-x", "radio-x", "radio-late-x"]
    assert len({line.id for line in found}) == 3
    (alone,) = read_cuts(manifests[0], "train", tmp_path, common_folder(manifests[:1]))
    assert alone.id == "x"


def test_ids_with_a_slash_are_different_files(tmp_path: Path) -> None:
    paths = set()
    for seconds, name in ((2.0, "a/b"), (3.0, "a-b"), (4.0, "é" * 200)):
        soundfile.write(tmp_path / f"{seconds}.wav", noise(seconds), RATE)
        source = AudioSource("command", [0], f"cat {tmp_path}/{seconds}.wav")
        spoken = supervision("s", 0, seconds)
        (found,) = read(tmp_path, cut(name, source, spoken, seconds=seconds))
        assert isinstance(found, Utterance) and found.id == name
        assert soundfile.info(found.path).duration == seconds
        paths.add(found.path.name)
    assert len(paths) == 3 and "a-b.flac" in paths


def test_a_line_that_is_no_cut_is_named(tmp_path: Path) -> None:
    source = AudioSource("file", [0], str(tmp_path / "a.wav"))
    good = json.dumps(cut("a", source, supervision("s", 0, 10)).to_dict())
    bad = [
        "{",
        '{"id": "x"}',
        "[]",
        good.replace('"anna"', '"\\ud83d"'),
        json.dumps(Recording("r", [source], RATE, RATE, 1.0).to_dict()),
    ]
    odd = json.loads(good) | {"id": "odd"}
    odd["supervisions"][0]["start"] = "0.5"
    (tmp_path / "cuts.jsonl").write_text("\n".join([*bad, json.dumps(odd), good]))
    found = list(read_cuts(tmp_path / "cuts.jsonl", "train", tmp_path / "audio", tmp_path))
    assert [line.id for line in found] == [*(f"cuts.jsonl:{n}" for n in range(1, 6)), "odd", "a"]
    for line in found[:-1]:
        assert isinstance(line, Rejection) and line.reason.startswith("not a cut (")


def test_a_broken_shard_ends_no_other(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(2.0), RATE)
    source = AudioSource("file", [0], str(tmp_path / "a.wav"))
    cuts = CutSet.from_cuts(
        cut(f"c{n}", source, supervision(f"s{n}", 0, 2), seconds=2.0) for n in range(4)
    )
    shar = tmp_path / "shar"
    shar.mkdir()
    cuts.to_shar(shar, fields={"recording": "flac"}, shard_size=2)
    archive = shar / "recording.000000.tar"
    archive.write_bytes(archive.read_bytes()[:2000])
    found = list(read_cuts(shar, "train", tmp_path / "audio", shar))
    assert [line.id for line in found][-2:] == ["c2", "c3"]
    assert isinstance(found[0], Rejection)
    assert found[0].id == "cuts.000000.jsonl.gz"
    assert "the rest of the shard cannot be read" in found[0].reason
