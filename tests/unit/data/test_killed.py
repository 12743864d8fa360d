"""Stages 1 to 4 killed at every file they write, and run again: the same files in the end."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from icetransfer.config import load_config
from icetransfer.experiment import create_experiment

REPO = Path(__file__).resolve().parents[3]


def run_stages(experiment_dir: Path, kill: str) -> dict[str, int]:
    """Runs the stages to their end; how often each was killed."""
    script = Path(__file__).with_name("killing.py")
    done = subprocess.run(
        [sys.executable, str(script), str(experiment_dir), kill],
        capture_output=True,
        text=True,
        cwd=REPO,
        env={"PYTHONPATH": str(REPO), "PATH": "", "OMP_NUM_THREADS": "1"},
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split("\t") for line in done.stdout.splitlines() if "\t" in line]
    return {module: int(kills) for module, kills in lines}


def files(folder: Path) -> dict[str, bytes]:
    """All files, but for those that have not got their name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def test_killed_stages_give_the_files_of_undisturbed_ones(
    tmp_path: Path, make_common_voice: Callable[[Path, str], Path]
) -> None:
    corpus = make_common_voice(tmp_path / "cv", "nl")
    settings = [
        "language=nl",
        f"data.dir={tmp_path / 'data'}",
        f"data.corpora.c={{kind: common_voice, path: {corpus}}}",
        "data.vocab_size=40",
        "data.features={jobs: 2, speeds: [0.9, 1.0]}",
    ]
    experiment = create_experiment(tmp_path / "exp", load_config([], settings))
    assert set(run_stages(experiment.dir, "never").values()) == {0}
    undisturbed = files(tmp_path / "data")
    assert {"manifests/c_train_fbank.jsonl.gz", "manifests/subset-all.txt"} < set(undisturbed)
    del undisturbed["config.yaml"]  # create_experiment wrote it
    for how in ("after", "before"):
        shutil.rmtree(tmp_path / "data")
        kills = run_stages(experiment.dir, how)
        # How often is a matter of chance where processes share the work; each once is not.
        assert len(kills) == 4 and min(kills.values()) >= 1, kills
        assert files(tmp_path / "data") == undisturbed
