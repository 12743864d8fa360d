"""Sweeps on a real Slurm of one host: of recipes that pretend, and the smoke preset itself."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from icetransfer.config import chunk_ms, dump_config
from icetransfer.score import planned_runs
from icetransfer.sweep import plan

REPO = Path(__file__).resolve().parent.parent.parent
PATIENCE = 300  # seconds for jobs of seconds: tests share their cores
SMOKE_SECONDS = 1500

# Takes what run.sh takes and notes each call.  Copies results that were laid out before.
# $SLOW: cells of this init work until the warning in their first run, and save then.
STAND_IN = """#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
printf '%s\\n' "$*" >>calls
[[ "$*" != *"--stop-stage 2"* ]] || exit 0
arguments=$*
while [ "$1" != --exp ]; do shift; done
[[ "$arguments" != *"--init ${BREAK:-none} "* ]] || { echo "error: broken on purpose" >&2; exit 1; }
[[ "$arguments" != *"--init ${HANG:-none} "* ]] || sleep 300
if [[ "$arguments" == *"--init ${SLOW:-none} "* ]] && [ ! -f "$2/saved" ]; then
  mkdir -p "$2"
  cp "prepared/$2/config.yaml" "$2"
  trap 'touch "$2/saved"; exit 75' USR1
  for _ in $(seq 600); do sleep 0.2; done
fi
mkdir -p "$(dirname "$2")"
cp -r "prepared/$2" "$(dirname "$2")"
"""

# Before it: the data stages are the real recipe's.  A share of the manifests fails in its first
# run, and one of the features is killed outright in its first, with all that it has started.
DATA = """#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
if [[ "$*" != *"--stop-stage 10"* ]]; then
  printf '%s\\n' "$*" >>calls
  if [[ "$*" == *"--stop-stage 1 --share 3/3"* && ! -f failed ]]; then
    touch failed
    exit 1
  fi
  [[ "$*" == *"--stop-stage 2 --share 2/3"* && ! -f killed ]] || exec bash real.sh "$@"
  touch killed
  setsid bash real.sh "$@" &
  until compgen -G "data/fbank/*/speed-*-00001.npy" >seen; do sleep 0.02; done
  kill -KILL -- "-$!"
  exit 137
fi
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository whose recipes pretend, at a path that a shell would take to pieces."""
    root = tmp_path / "a 'b' $(touch owned) \"c\"\nd%j"
    for name in ("icetransfer", "tools"):
        ignored = shutil.ignore_patterns("__pycache__", "languages", "grammars")
        shutil.copytree(REPO / name, root / name, ignore=ignored)
    for name in ("run_all.sh", "requirements.txt"):
        shutil.copy(REPO / name, root)
    recipe = root / "egs" / "nl"
    (recipe / "conf").mkdir(parents=True)
    shutil.copy(REPO / "egs" / "nl" / "conf" / "default.yaml", recipe / "conf")
    (recipe / "run.sh").write_text(STAND_IN)
    return root


def write_preset(root: Path) -> plan.Sweep:
    """Writes a preset and the results that its cells will pretend to find."""
    path = root / "$(touch owned) 'try'.yaml"
    settings = ["decode.chunk_sizes=[16]", "decode.engines=[sherpa]"]
    path.write_text(yaml.safe_dump({"languages": ["nl"], "hours": ["2min"], "settings": settings}))
    made = plan.read_preset(str(path), {}, root)
    for cell in made.cells:
        folder = root / "egs/nl/prepared" / made.experiment(cell).relative_to(root / "egs/nl")
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(dump_config(made.config(cell)))
        for run in planned_runs(made.config(cell)):
            result = {
                "language": "nl",
                "init": cell.init,
                "seed": cell.seed,
                "test_set": run.test_set,
                "engine": run.engine,
                "precision": run.precision,
                "chunk_ms": chunk_ms(run.chunk_size),
                "wer": 40,
                "cer": 20,
                "words": 10,
                "errors": 4,
                "utterances": 2,
                "failed": 0,
                "rtf": 0.1,
                "model_bytes": 100,
            }
            target = run.folder(folder / "decode") / "wer.json"
            target.parent.mkdir(parents=True)
            target.write_text(json.dumps(result))
    return made


def write_conf(root: Path, **changes: object) -> Path:
    path = root / "slurm.yaml"
    tree = {"cpus": 1, "at_once": 2, "time": "5", "warn_seconds": 10}
    path.write_text(yaml.safe_dump(tree | changes))
    return path


def call(
    root: Path, environment: dict[str, str], *arguments: str, **more: str
) -> subprocess.CompletedProcess[str]:
    here = {"VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{environment['PATH']}"}
    preset = ["--preset", str(next(root.glob("*.yaml")).parent / "$(touch owned) 'try'.yaml")]
    return subprocess.run(
        [str(root / "run_all.sh"), *preset, *arguments],
        env=environment | here | more | {"PYTHONPATH": ""},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def submit(root: Path, environment: dict[str, str], **more: str) -> str:
    conf = ("--slurm-conf", str(root / "slurm.yaml"))
    done = call(root, environment, "--cmd", "slurm", *conf, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def queue(environment: dict[str, str]) -> list[str]:
    command = ["squeue", "--noheader", "--array", "--format=%j %i %T %k"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.stdout.splitlines()


def wait_until_empty(environment: dict[str, str], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    empty = 0
    while empty < 6:  # a job that goes into the queue again is not in it for a moment
        jobs = queue(environment)
        empty = 0 if jobs else empty + 1
        assert time.monotonic() < deadline, jobs
        time.sleep(0.5)


def calls(root: Path, init: str) -> int:
    path = root / "egs" / "nl" / "calls"
    lines = path.read_text().splitlines() if path.is_file() else []
    return sum("--stage 3" in line and f"--init {init} " in line for line in lines)


def nothing_was_expanded(root: Path) -> bool:
    return not list(root.parent.rglob("owned"))


def test_a_wrong_partition_is_named_before_anything_is_submitted(
    root: Path, slurm: dict[str, str]
) -> None:
    write_preset(root)
    conf = write_conf(root, stages={"report": {"partition": "no-such"}})
    done = call(root, slurm, "--cmd", "slurm", "--slurm-conf", str(conf))
    assert done.returncode == 2
    assert "no-such" in done.stderr
    assert "nothing was submitted" in done.stderr
    assert "of cpu" in done.stderr
    assert not queue(slurm)


def test_warned_failing_and_good_jobs(root: Path, slurm: dict[str, str]) -> None:
    """EN cells are warned of their limit and go on; ML cells fail three times and are reported."""
    made = write_preset(root)
    # warned a quarter of a minute after its begin: limits are whole minutes
    write_conf(root, stages={"cell": {"time": "1", "warn_seconds": 45}})
    said = submit(root, slurm, SLOW="en", BREAK="ml")
    assert "2 cell jobs" in said
    wait_until_empty(slurm)
    assert calls(root, "en") == 2
    assert calls(root, "ml") == 3
    done = {cell.init: made.is_done(cell) for cell in made.cells}
    assert done == {"en": True, "ml": False}
    report = json.loads((made.results / "report.json").read_text())
    assert len(report["failures"]) == 1
    assert "tried 3 times" in report["failures"][0]
    assert "broken on purpose" in report["failures"][0]
    table = call(root, slurm, "--status").stdout
    assert "1 done" in table
    assert "1 failed" in table
    # mended, the same command runs what is missing
    submit(root, slurm)
    wait_until_empty(slurm)
    assert (calls(root, "en"), calls(root, "ml")) == (2, 4)
    assert all(made.is_done(cell) for cell in made.cells)
    assert not json.loads((made.results / "report.json").read_text())["failures"]
    assert nothing_was_expanded(root)


def make_data_recipe(root: Path) -> None:
    """A recipe whose data stages are real, in small parts and shards, with speech of its own."""
    for name, old, new in (
        ("corpora", "PART = 1000 ", "PART = 10 "),
        ("features", "SHARD_SECONDS = 600\n", "SHARD_SECONDS = 5\n"),
    ):
        path = root / "icetransfer" / "data" / f"{name}.py"
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))
    languages = "icetransfer/data/text/languages"
    shutil.copytree(REPO / languages, root / languages)
    recipe = root / "egs" / "nl"
    (recipe / "run.sh").write_text(DATA + STAND_IN)
    shutil.copy(REPO / "egs" / "nl" / "run.sh", recipe / "real.sh")
    corpus = {"kind": "folder", "path": "speech", "holdout_every": 8}
    tree = {"data": {"dir": "data", "corpora": {"c": corpus}, "features": {"jobs": 1}}}
    (recipe / "conf" / "default.yaml").write_text(yaml.safe_dump(tree))
    (recipe / "speech").mkdir()
    lines = []
    for number in range(120):
        noise = np.random.default_rng(number).normal(0, 0.1, 24000 + 100 * number)
        soundfile.write(recipe / "speech" / f"{number}.flac", noise, 16000)
        lines.append(f"{number}.flac\t{'ja' if number % 9 else ''}\tx\n")
    (recipe / "speech" / "transcripts.tsv").write_text("".join(lines))


def data_files(recipe: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(recipe)): path.read_bytes()
        for folder in ("manifests", "fbank")
        for path in (recipe / "data" / folder).rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def test_data_in_shares_of_which_one_fails_and_one_is_killed(
    root: Path, slurm: dict[str, str]
) -> None:
    """Manifests and features are, byte for byte, those of one process."""
    make_data_recipe(root)
    made = write_preset(root)
    recipe, alone = root / "egs" / "nl", root / "alone" / "nl"
    shutil.copytree(recipe, alone)
    write_conf(root, data_shares=3, stages={"data": {"at_once": 3}})
    said = submit(root, slurm)
    assert said.count("3 data jobs") == 2
    assert said.count("1 data job\n") == 3
    wait_until_empty(slurm)
    calls = (recipe / "calls").read_text()
    assert calls.count("--stop-stage 1 --share 1/3 ") == 1
    assert calls.count("--stop-stage 1 --share 3/3 ") == 2, "the one that failed was tried again"
    assert calls.count("--stop-stage 2 --share 1/3 ") == 1
    assert calls.count("--stop-stage 2 --share 2/3 ") == 2, "the killed one came back"
    assert all(made.is_done(cell) for cell in made.cells)
    settings = ["--init", "en", "--hours", "2min", "--stage", "1", "--stop-stage", "2"]
    here = {"VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{slurm['PATH']}"}
    command = ["bash", "real.sh", *settings]
    subprocess.run(command, cwd=alone, env=slurm | here | {"PYTHONPATH": ""}, check=True)
    assert len(data_files(recipe)) > 150
    assert data_files(recipe) == data_files(alone)
    assert nothing_was_expanded(root)


def test_one_job_cancelled_by_hand(root: Path, slurm: dict[str, str]) -> None:
    made = write_preset(root)
    write_conf(root)
    submit(root, slurm, HANG="ml")
    deadline = time.monotonic() + PATIENCE
    while not calls(root, "ml"):
        assert time.monotonic() < deadline
        time.sleep(0.3)
    (task,) = (line.split()[1] for line in queue(slurm) if "nl_ml_2min_seed_1" in line)
    subprocess.run(["scancel", task], env=slurm, check=True)
    wait_until_empty(slurm)
    assert {cell.init for cell in made.cells if made.is_done(cell)} == {"en"}
    assert json.loads((made.results / "report.json").read_text())["missing"]


def test_a_full_queue_is_waited_for_and_only_our_jobs_are_cancelled(
    root: Path, slurm: dict[str, str]
) -> None:
    made = write_preset(root)
    write_conf(root)
    filler = ["sbatch", "--parsable", "--job-name=other", "--cpus-per-task=4", "--output=/dev/null"]
    subprocess.run([*filler, "--wrap=sleep 600"], env=slurm, check=True, stdout=subprocess.PIPE)
    try:
        submit(root, slurm)
        names = [line.split()[0] for line in queue(slurm)]
        assert len(names) == 5  # the other job, data, two cells, report
        assert "2 cells are in the queue already" in submit(root, slurm)
        assert len(queue(slurm)) == 5
        table = call(root, slurm, "--status").stdout
        assert table.count("waiting") >= 3
        assert "Dependency" in table
        assert "cancelled 4 jobs" in call(root, slurm, "--cancel").stdout
        assert [line.split()[0] for line in queue(slurm)] == ["other"]
        assert not any(made.is_done(cell) for cell in made.cells)
    finally:
        subprocess.run(["scancel", "--name=other"], env=slurm)
        wait_until_empty(slurm)


def test_smoke(slurm: dict[str, str], tmp_path: Path) -> None:
    """The real recipes, from speech to the report."""
    if not (REPO / "egs" / "base_models" / "en.pt").is_file():
        pytest.skip("egs/base_models has no en.pt: train it with egs/en")
    tree = yaml.safe_load((REPO / "egs" / "presets" / "smoke.yaml").read_text())
    tree["settings"] += ["data.dir=data/smoke-slurm"]  # another test makes data/smoke
    preset, conf = tmp_path / "smoke-slurm.yaml", write_conf(tmp_path, time="30")
    preset.write_text(yaml.safe_dump(tree))
    results = REPO / "results" / "smoke-slurm"
    for earlier in (results, REPO / "egs" / "nl" / "exp" / "smoke-slurm"):
        shutil.rmtree(earlier, ignore_errors=True)
    here = {"VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{slurm['PATH']}"}
    command = [str(REPO / "run_all.sh"), "--preset", str(preset), "--cmd", "slurm"]
    done = subprocess.run(
        [*command, "--slurm-conf", str(conf)],
        env=slurm | here | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    wait_until_empty(slurm, SMOKE_SECONDS)
    report = json.loads((results / "report.json").read_text())
    assert not report["missing"], sorted((results / "log").iterdir())
    assert not report["failures"]
    assert {row["init"] for row in report["results"]} == {"en", "ml", "random"}
