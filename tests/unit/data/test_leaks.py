"""What is held out is not learned from, whatever its name; and it stays where it is."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from icetransfer.config import load_config
from icetransfer.data import corpora, features
from icetransfer.data.jsonl import read_jsonl_gz
from icetransfer.data.readers.folder import read_folder
from icetransfer.experiment import Experiment, create_experiment

DRAW = np.random.default_rng(3)


def write_folder(folder: Path, rows: dict[str, tuple[str, str]]) -> Path:
    """A folder of recordings: name -> speaker and split."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in rows:
        if not (folder / name).is_file():
            soundfile.write(folder / name, DRAW.uniform(-0.3, 0.3, 16000), 16000)
    lines = [f"{name}\tde kat\t{speaker}\t{split}\n" for name, (speaker, split) in rows.items()]
    (folder / "transcripts.tsv").write_text("".join(lines), encoding="utf-8")
    return folder


def make_experiment(tmp_path: Path, **folders: Path) -> Experiment:
    named = ", ".join(f"{name}: {{kind: folder, path: {path}}}" for name, path in folders.items())
    words = ["language=nl", f"data.dir={tmp_path / 'data'}", f"data.corpora={{{named}}}"]
    words.append("data.features={jobs: 1, speeds: [1.0]}")
    return create_experiment(tmp_path / "exp", load_config([], words))


SPLIT = {"a.wav": ("x", "train"), "b.wav": ("y", "dev"), "c.wav": ("z", "test")}


def test_a_copy_under_another_name_and_in_another_format_is_found(tmp_path: Path) -> None:
    one = write_folder(tmp_path / "one", SPLIT)
    two = tmp_path / "two"
    two.mkdir()
    samples, rate = soundfile.read(one / "c.wav", dtype="int16")
    soundfile.write(two / "other.flac", samples, rate)
    write_folder(two, {"other.flac": ("w", "train")} | {n: SPLIT[n] for n in ("b.wav", "c.wav")})
    experiment = make_experiment(tmp_path, one=one, two=two)
    with pytest.raises(ValueError, match=r"1 training .*other of two_train is c of one_test"):
        corpora.prepare(experiment)
    listed = (experiment.manifests_dir / "leaks.tsv").read_text().splitlines()
    assert listed[1:] == ["two_train\tother\tone_test\tc"]
    with pytest.raises(ValueError, match="1 training recordings"):
        corpora.prepare(experiment)  # it is not forgotten
    soundfile.write(two / "other.flac", samples[::-1], rate)
    corpora.prepare(experiment)
    assert (experiment.manifests_dir / "apart.json").is_file()


def test_the_same_file_in_two_corpora_is_found(tmp_path: Path) -> None:
    one = write_folder(tmp_path / "one", SPLIT)
    two = write_folder(tmp_path / "two", SPLIT)
    shutil.copy(one / "b.wav", two / "a.wav")
    experiment = make_experiment(tmp_path, one=one, two=two)
    with pytest.raises(ValueError, match=r"a of two_train is b of one_dev"):
        corpora.prepare(experiment)


def test_a_replaced_recording_is_checked_and_computed_again(
    tmp_path: Path, caplog, monkeypatch
) -> None:
    folder = write_folder(tmp_path / "one", SPLIT)
    experiment = make_experiment(tmp_path, one=folder)

    def values() -> np.ndarray:
        (cut,) = features.read_manifest(experiment.manifests_dir / "one_train_fbank.jsonl.gz")
        return np.array(cut.load_features())

    def stages() -> None:
        corpora.prepare(experiment)
        features.compute_features(experiment)

    stages()
    before = values()
    with caplog.at_level("INFO", logger="icetransfer"):
        stages()
    assert caplog.text.count("skip: ") == 4
    soundfile.write(folder / "a.wav", DRAW.uniform(-0.3, 0.3, 16000), 16000)
    os.utime(folder / "a.wav", ns=(1, 1))
    with caplog.at_level("INFO", logger="icetransfer"):
        stages()
    assert f"changed since its manifests: recordings, such as {folder / 'a.wav'}" in caplog.text
    assert np.abs(values() - before).max() > 0.1
    monkeypatch.setattr(features, "FORMAT", 2)
    with caplog.at_level("INFO", logger="icetransfer"):
        stages()
    assert "what one_train.jsonl.gz has is of another version" in caplog.text


def test_a_recording_that_is_repaired_is_seen(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "one", SPLIT | {"d.wav": ("x", ""), "e.wav": ("x", "")})
    experiment = make_experiment(tmp_path, one=folder)
    whole = (folder / "d.wav").read_bytes()
    (folder / "d.wav").write_bytes(whole[:20_000])
    missing = (folder / "e.wav").rename(tmp_path / "elsewhere.wav")
    for repair in (
        lambda: None,
        lambda: (folder / "d.wav").write_bytes(whole),
        lambda: missing.rename(folder / "e.wav"),
    ):
        repair()
        corpora.prepare(experiment)
        manifests = [
            experiment.manifests_dir / f"one_{s}.jsonl.gz" for s in ("train", "dev", "test")
        ]
        there = {cut["id"] for path in manifests for cut in read_jsonl_gz(path)}
        sound = {n for n in "abcde" if (folder / f"{n}.wav").is_file()}
        if (folder / "d.wav").stat().st_size < len(whole):
            sound.remove("d")
        assert there == sound


def test_parts_of_one_file_that_overlap_are_found(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "long.wav", DRAW.uniform(-0.3, 0.3, 16000 * 20), 16000)
    places = {"train": [(0, 3), (12.0, 3), (15, 2)], "dev": [(5, 3)], "test": [(3, 2), (10, 3)]}

    def write(places: dict[str, list[tuple[float, float]]]) -> None:
        for split, parts in places.items():
            rows = [
                {"audio_filepath": "long.wav", "offset": start, "duration": seconds, "text": "ja"}
                for start, seconds in parts
            ]
            (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))

    write(places)
    lists = ", ".join(f"{split}: [{tmp_path / split}.jsonl]" for split in places)
    words = ["language=nl", f"data.dir={tmp_path / 'data'}", "data.features={jobs: 1}"]
    words.append(f"data.corpora={{c: {{kind: jsonl, {lists}}}}}")
    experiment = create_experiment(tmp_path / "exp", load_config([], words))
    with pytest.raises(
        ValueError, match=r"1 .*\(long-00012000 of c_train is long-00010000 of c_te"
    ):
        corpora.prepare(experiment)
    write(places | {"train": [(0, 3), (13.05, 1.95), (15, 2)]})  # what touches is apart
    corpora.prepare(experiment)


def test_an_id_that_is_learned_and_held_out_is_an_error(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "one", SPLIT)
    table = folder / "transcripts.tsv"
    rows = table.read_text()
    table.write_text(rows + "a.wav\tde kat\tx\ttest\n" + "c.wav\tde kat\tx\ttrain\n")
    experiment = make_experiment(tmp_path, one=folder)
    with pytest.raises(ValueError, match="2 training recordings are in a dev or test split too"):
        corpora.prepare(experiment)
    listed = (experiment.manifests_dir / "leaks.tsv").read_text().splitlines()[1:]
    assert listed == [
        "one_train\ta\tdev or test of the same corpus\ta", "one_train\tc\tone_test\tc",
    ]  # fmt: skip
    table.write_text(rows + "a.wav\tde kat\tx\ttrain\n")
    corpora.prepare(experiment)  # twice on one side is a warning


def splits(folder: Path, every: int, by_speaker: bool = False) -> dict[str, str]:
    return {row.id: row.split for row in read_folder(folder, every, by_speaker)}


def write_table(folder: Path, rows: dict[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    lines = [f"{name}.wav\ttekst\t{speaker}\n" for name, speaker in rows.items()]
    (folder / "transcripts.tsv").write_text("".join(lines), encoding="utf-8")
    return folder


def test_held_out_recordings_stay_when_others_come_and_go(tmp_path: Path) -> None:
    rows = {f"r{number}": "" for number in range(2000)}
    before = splits(write_table(tmp_path / "f", rows), 10)
    fewer = {name: speaker for name, speaker in rows.items() if not name.endswith("3")}
    after = splits(write_table(tmp_path / "f", {"new": ""} | fewer), 10)
    assert all(after[name] == before[name] for name in fewer)
    counts = {split: list(before.values()).count(split) for split in ("train", "dev", "test")}
    assert 150 < counts["test"] < 250 and 150 < counts["dev"] < 250
    assert set(splits(tmp_path / "f", 0).values()) == {"train"}
    assert set(splits(tmp_path / "f", 1).values()) == {"test"}


def test_a_speakers_recordings_are_held_out_together_on_request(tmp_path: Path) -> None:
    rows = {f"r{number}": f"s{number % 40}" for number in range(400)} | {"x": "", "y": ""}
    found = splits(write_table(tmp_path / "f", rows), 5, by_speaker=True)
    of_speaker = {}
    for name, speaker in rows.items():
        if speaker:
            of_speaker.setdefault(speaker, set()).add(found[name])
    assert all(len(own) == 1 for own in of_speaker.values())
    assert {split for own in of_speaker.values() for split in own} == {"train", "dev", "test"}
    apart = splits(tmp_path / "f", 5)
    assert any(len({apart[n] for n, s in rows.items() if s == who}) > 1 for who in of_speaker)
