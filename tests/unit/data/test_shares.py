"""Stages 1 and 2 in shares, by several processes at a time: the files of one process."""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import AudioSource, CutSet, MonoCut, Recording, SupervisionSegment

from icetransfer.config import load_config
from icetransfer.data import corpora
from icetransfer.data.jsonl import read_jsonl_gz
from icetransfer.data.recordings import Limits
from icetransfer.experiment import create_experiment
from icetransfer.settings.corpora import Cuts, FolderCorpus
from icetransfer.stage.share import ALL, Share

REPO = Path(__file__).resolve().parents[3]


def make_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe's folder with a corpus of 24 recordings, of which some cannot be used."""
    audio = folder / "speech"
    audio.mkdir(parents=True)
    lines = []
    for number in range(24):
        samples = np.random.default_rng(number).normal(0, 0.1, 8000 + 100 * number)
        soundfile.write(audio / f"{number}.wav", samples, 16000)
        lines.append(f"{number}.wav\t{'ja' if number % 7 else ''}\tx{number % 5}\n")
    (audio / "transcripts.tsv").write_text("".join(lines))
    settings = ["language=nl", "data.dir=data", "data.features={jobs: 1, speeds: [0.9, 1.0]}"]
    settings += ["data.corpora.c={kind: folder, path: speech, holdout_every: 5}"]
    monkeypatch.chdir(folder)  # paths in manifests are relative to it
    create_experiment(Path("exp"), load_config([], settings))
    return folder


def run(folder: Path, *steps: str) -> dict[str, int]:
    """Runs steps of `sharing.py`: how much was made after each."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("sharing.py")), *steps],
        cwd=folder, env={"PYTHONPATH": str(REPO), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split("\t") for line in done.stdout.splitlines() if "\t" in line]
    return {step: int(count) for step, count in rows}


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def test_shares_side_by_side_do_nothing_twice_and_give_the_files_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = make_recipe(tmp_path / "alone", monkeypatch)
    shared = shutil.copytree(alone, tmp_path / "shared")
    wanted = run(alone, "corpora 1/1", "features 1/1")
    # two of the shares are the same, and those of the features are killed first
    found = run(
        shared, "corpora 1/2 2/2 1/2", "corpora 1/1",
        "features kill 2/3", "features 1/3 2/3 3/3 2/3", "features 1/1",
    )  # fmt: skip
    assert found["corpora 1/2 2/2 1/2"] == found["corpora 1/1"] == wanted["corpora 1/1"] == 24
    assert found["features 1/3 2/3 3/3 2/3"] == found["features 1/1"], "all was done by the shares"
    everything = (shared / "made").read_text().splitlines()
    assert set(everything) == set((alone / "made").read_text().splitlines())
    assert len(everything) - len(set(everything)) <= 1, "but for what the kill interrupted"
    assert files(shared / "data") == files(alone / "data")


def test_shares_write_no_manifests_and_check_a_recording_that_was_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="icetransfer")
    monkeypatch.setattr(corpora, "PART", 3)
    folder, manifests = make_recipe(tmp_path / "recipe", monkeypatch), tmp_path / "manifests"
    corpus = FolderCorpus(kind="folder", path=folder / "speech", holdout_every=5)
    source = corpora.Source("c", corpus, folder / "speech", "nl", Limits(0.5, 30.0))
    first, second = Share(1, 2), Share(2, 2)
    corpora.prepare_manifests(source, manifests, share=first)
    assert not [path for path in manifests.iterdir() if path.is_file()]
    parts = manifests / "c_parts"
    assert len(list(parts.rglob("0*.jsonl.gz"))) == 4, "half of 24 recordings, 3 at a time"
    corpora.prepare_manifests(source, manifests)
    before = files(manifests)
    assert not parts.exists()
    soundfile.write(folder / "speech/1.wav", np.random.default_rng(99).normal(0, 0.1, 16000), 16000)
    for share in (first, second):
        corpora.prepare_manifests(source, manifests, share=share)
        assert "recordings, such as" in caplog.text
        assert files(manifests).items() > before.items(), "what is there stays until the join"
    monkeypatch.setattr(corpora, "check_part", None)  # nothing is left to check
    corpora.prepare_manifests(source, manifests)
    assert files(manifests)["c_audio.jsonl.gz"] != before["c_audio.jsonl.gz"]
    corpora.prepare_manifests(source, manifests, share=first)
    assert "manifests of c are complete" in caplog.text


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/0", "a/b", "-1/3", "1/3/5"])
def test_a_share_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="as 2/3"):
        Share.parse(text)


def test_every_shard_is_in_one_share() -> None:
    assert Share.parse("1/1") == ALL
    shares = [Share.parse(f"{number}/3") for number in (1, 2, 3)]
    for shard in range(7):
        assert sum(share.has(shard) for share in shares) == 1


def test_a_share_writes_the_audio_of_its_own_recordings_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora, "PART", 2)
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(1).normal(0, 0.1, 16000), 16000)
    cuts = []
    for number in range(5):
        name = f"c{number}"
        said = SupervisionSegment(name, name, 0, 1, text="ja", speaker="anna")
        command = AudioSource("command", [0], f"cat {tmp_path}/a.wav")
        recording = Recording(name, [command], 16000, 16000, 1.0)
        cuts.append(MonoCut(name, 0, 1, 0, [said], recording=recording))
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl")
    corpus = Cuts(kind="cuts", train=[tmp_path / "cuts.jsonl"])
    source = corpora.Source("c", corpus, tmp_path / "corpus", "nl", Limits(0.5, 30.0))
    corpora.prepare_manifests(source, tmp_path / "manifests", share=Share(2, 2))
    written = sorted(path.stem for path in (tmp_path / "corpus/audio").iterdir())
    assert written == ["c2", "c3"]
    corpora.prepare_manifests(source, tmp_path / "manifests")
    manifest = read_jsonl_gz(tmp_path / "manifests/c_train.jsonl.gz")
    assert [cut["id"] for cut in manifest] == [f"c{number}" for number in range(5)]
