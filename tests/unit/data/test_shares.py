"""Stages 1 and 2 in shares, by several processes at a time: the files of one process."""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from icetransfer.config import load_config
from icetransfer.experiment import create_experiment
from icetransfer.stage.share import ALL, Share

REPO = Path(__file__).resolve().parents[3]
# A stage as its command runs it, in small parts and shards, which are noted as they are made.
STAGE = """
import importlib, sys
from icetransfer.experiment import run_stage_in_shares
name = sys.argv.pop(1)
sys.argv[0] = f"data/{name}.py"
module = importlib.import_module(f"icetransfer.data.{name}")
module.PART, module.SHARD_SECONDS = 3, 2
made = {"corpora": "check", "features": "compute_shard"}[name]
function = getattr(module, made)
def noted(*arguments):
    what = arguments[2] if name == "features" else arguments[0].id
    with open("made", "a") as file:
        file.write(f"{what}\\n")
    return function(*arguments)
setattr(module, made, noted)
stage = {"corpora": "prepare", "features": "compute_features"}[name]
run_stage_in_shares("", getattr(module, stage))
"""


def make_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe's folder with a corpus of 60 recordings, of which some cannot be used."""
    audio = folder / "speech"
    audio.mkdir(parents=True)
    lines = []
    for number in range(60):
        samples = np.random.default_rng(number).normal(0, 0.1, 8000 + 100 * number)
        soundfile.write(audio / f"{number}.wav", samples, 16000)
        lines.append(f"{number}.wav\t{'ja' if number % 7 else ''}\tx{number % 5}\n")
    (audio / "transcripts.tsv").write_text("".join(lines))
    settings = ["language=nl", "data.dir=data", "data.features={jobs: 1, speeds: [0.9, 1.0]}"]
    settings += ["data.corpora.c={kind: folder, path: speech, holdout_every: 5}"]
    monkeypatch.chdir(folder)  # paths in manifests are relative to it
    create_experiment(Path("exp"), load_config([], settings))
    return folder


def start(folder: Path, stage: str, *share: str) -> "subprocess.Popen[str]":
    """Begins a stage, or a share of it."""
    return subprocess.Popen(
        [sys.executable, "-c", STAGE, stage, "--exp", "exp", *share],
        cwd=folder,
        env={"PYTHONPATH": str(REPO), "PATH": "", "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes: "subprocess.Popen[str]") -> str:
    said = [process.communicate(timeout=100)[1] for process in processes]
    assert not any(process.returncode for process in processes), said
    return "".join(said)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def made(folder: Path) -> list[str]:
    """What was checked or computed so far, in order."""
    return (folder / "made").read_text().splitlines()


def test_shares_side_by_side_do_nothing_twice_and_give_the_files_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = make_recipe(tmp_path / "alone", monkeypatch)
    shared = shutil.copytree(alone, tmp_path / "shared")
    for stage in ("corpora", "features"):
        finish(start(alone, stage))
        shares = ("1/2", "2/2", "1/2")  # of which two are the same
        finish(*[start(shared, stage, "--share", share) for share in shares])
        assert sorted(made(shared)) == sorted(made(alone))
        if stage == "corpora":
            assert not list((shared / "data/manifests").glob("*.*")), "shares write no manifests"
        finish(start(shared, stage))
        assert len(made(shared)) == len(made(alone)), "what the shares did was done again"
    assert len(set(made(shared))) == len(made(shared)) > 60
    assert files(shared / "data") == files(alone / "data")


def test_a_killed_share_keeps_what_it_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_recipe(tmp_path / "recipe", monkeypatch)
    finish(start(folder, "corpora"))
    share = start(folder, "features", "--share", "1/2")
    shards = folder / "data/fbank/c_train"
    deadline = time.monotonic() + 60
    while not (done := {path: path.stat().st_mtime_ns for path in shards.glob("speed-*.jsonl.gz")}):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    share.kill()
    share.communicate()
    finish(start(folder, "features", "--share", "1/2"), start(folder, "features", "--share", "2/2"))
    assert {path: path.stat().st_mtime_ns for path in done} == done
    finish(start(folder, "features"))
    assert (folder / "data/manifests/c_train_fbank.jsonl.gz").is_file()


def test_shares_check_a_corpus_of_which_a_recording_was_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_recipe(tmp_path / "recipe", monkeypatch)
    finish(start(folder, "corpora"))
    manifests = files(folder / "data/manifests")
    samples = np.random.default_rng(99).normal(0, 0.1, 16000)
    soundfile.write(folder / "speech/1.wav", samples, 16000)
    checked = len(made(folder))
    both = [start(folder, "corpora", "--share", share) for share in ("1/2", "2/2")]
    assert "recordings, such as speech/1.wav" in finish(*both)
    assert len(made(folder)) == 2 * checked
    finish(start(folder, "corpora"))
    assert len(made(folder)) == 2 * checked
    assert files(folder / "data/manifests") != manifests
    assert "are complete" in finish(
        start(folder, "corpora"), start(folder, "corpora", "--share", "1/2")
    )


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/0", "a/b", "-1/3", "1/3/5"])
def test_a_share_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="as 2/3"):
        Share.parse(text)


def test_every_shard_is_in_one_share() -> None:
    assert Share.parse("1/1") == ALL
    shares = [Share.parse(f"{number}/3") for number in (1, 2, 3)]
    for shard in range(7):
        assert sum(share.has(shard) for share in shares) == 1
