"""Plans, and sweeps of recipes that only pretend: see tests/recipe for the real ones."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from icetransfer.config import chunk_ms, dump_config
from icetransfer.experiment import Experiment
from icetransfer.score import planned_runs
from icetransfer.sweep import jobs, local, plan

REPO = Path(__file__).resolve().parents[3]

# Takes what run.sh takes; notes each call; writes results with a WER that depends on the init.
STAND_IN = """#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
printf '%s\\n' "$*" >>calls
[[ "$*" != *"--stop-stage 2"* ]] || exit 0
[[ "$*" != *"--init ${BREAK:-none} "* ]] || { echo "error: broken on purpose" >&2; exit 2; }
sleep "${SLEEP:-0}"
while [ "$1" != --exp ]; do shift; done
mkdir -p "$(dirname "$2")"
cp -r "prepared/$2" "$(dirname "$2")"
echo "$2" >>finished
"""
PRESET = {"languages": ["nl", "it"], "hours": ["2min", "8min"], "random_hours": ["2min"]}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository, at a path that wants quoting, whose recipes pretend."""
    root = tmp_path / 'it\'s a "repo"'
    for language in ("nl", "it", "en", "multilingual"):
        recipe = root / "egs" / language
        (recipe / "conf").mkdir(parents=True)
        shutil.copy(REPO / "egs" / "nl" / "conf" / "default.yaml", recipe / "conf")
        (recipe / "run.sh").write_text(STAND_IN)
    return root


def prepare(made: plan.Sweep) -> None:
    """Lays out what the recipes of the sweep will pretend to have found."""
    for cell in made.cells:
        recipe = made.recipe(cell.language)
        folder = recipe / "prepared" / made.experiment(cell).relative_to(recipe)
        resolved = made.config(cell)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump_config(resolved))
        wer = {"en": 40, "ml": 35, "random": 80}[cell.init] + cell.seed / 10
        for planned in planned_runs(resolved):
            result = {
                "language": cell.language,
                "init": cell.init,
                "seed": cell.seed,
                "test_set": planned.test_set,
                "engine": planned.engine,
                "precision": planned.precision,
                "chunk_ms": chunk_ms(planned.chunk_size),
                "wer": wer,
                "cer": wer / 2,
                "words": 10,
                "errors": 4,
                "utterances": 2,
                "failed": 0,
                "rtf": 0.1,
                "model_bytes": 100,
            }
            target = planned.folder(folder / "decode")
            target.mkdir(parents=True, exist_ok=True)
            (target / "wer.json").write_text(json.dumps(result))


def make(root: Path, **changes: object) -> plan.Sweep:
    preset = plan.Preset.model_validate(PRESET | changes)
    made = plan.Sweep("try", preset, preset.settings, root)
    prepare(made)
    return made


def run_all(made: plan.Sweep, retrain: bool = False) -> bool:
    runner = local.Runner(made.results)
    try:
        return local.run_sweep(made, runner, at_once=2, retrain=retrain)
    finally:
        runner.close()


def calls(root: Path) -> list[str]:
    return [
        f"{path.parent.name} {line}"
        for path in sorted((root / "egs").glob("*/calls"))
        for line in path.read_text().splitlines()
    ]


def test_plan_of_mini() -> None:
    made = plan.read_preset("mini", {})
    cells = made.cells
    assert len(cells) == len(set(cells))
    assert {cell.language for cell in cells} == {"nl", "it", "pl"}
    hours = {cell.hours for cell in cells}
    assert len(hours) == 3
    assert 2 / 60 <= min(hours) < max(hours) <= 0.5
    for language in ("nl", "it", "pl"):
        for init in ("en", "ml"):
            found = {c.hours for c in cells if (c.language, c.init) == (language, init)}
            assert found == hours
        assert any(c.language == language and c.init == "random" for c in cells)
    repeat = made.preset.replicates
    assert repeat is not None
    for init in ("en", "ml"):
        seeds = {
            c.seed
            for c in cells
            if (c.language, c.init, c.hours) == (repeat.language, init, repeat.hours)
        }
        assert len(seeds) >= 3
    assert [cell.hours for cell in cells] == sorted((c.hours for c in cells), reverse=True)


@pytest.mark.parametrize("name", ["mini", "smoke"])
def test_configs_of_every_cell_are_valid(name: str) -> None:
    made = plan.read_preset(name, {})
    for cell in made.cells:
        assert made.config(cell).init == cell.init


def test_changes_go_over_the_preset() -> None:
    made = plan.read_preset("mini", {"languages": "nl", "inits": "ml", "hours": "8min 1h"})
    assert made.preset.languages == ("nl",)
    assert made.preset.hours == pytest.approx((8 / 60, 1))
    assert {cell.init for cell in made.cells} == {"ml", "random"}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("nothing", {}, "known are mini, paper, smoke"),
        ("mini", {"languages": "nl xx"}, "no recipe egs/xx; there are de en"),
        ("mini", {"inits": "en klingon"}, "inits has klingon"),
        ("mini", {"hours": "lots"}, "hours.0"),
        ("mini", {"seeds": 0}, "seeds"),
    ],
)
def test_bad_presets_are_named(name: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan.read_preset(name, changes)


def test_an_unknown_field_is_named(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("languages: [nl]\nhours: [1h]\nlangauges: [it]\n")
    with pytest.raises(ValueError, match="unknown config key langauges; did you mean languages"):
        plan.read_preset(str(path), {})


def test_sweep_runs_each_cell_once_and_reports(root: Path, capfd: pytest.CaptureFixture) -> None:
    made = make(root)
    assert run_all(made)
    first = calls(root)
    assert len([call for call in first if "--stop-stage 2" in call]) == 2
    assert len([call for call in first if "--stage 3" in call]) == 2 * 2 * 2 + 2
    out = capfd.readouterr().out
    assert "+5.00" in out
    assert f"report: {os.path.relpath(made.results / 'report.md')}" in out.replace("\n", "")
    report = json.loads((made.results / "report.json").read_text())
    assert not report["missing"]
    assert report["provenance"]["versions"]["torch"]
    assert run_all(made)
    assert calls(root) == first, "a second sweep has nothing to do"


def test_a_lost_result_is_made_again(root: Path) -> None:
    made = make(root)
    run_all(made)
    before = len(calls(root))
    cell = made.cells[0]
    shutil.rmtree(made.experiment(cell))
    assert not made.is_done(cell)
    run_all(made)
    assert len(calls(root)) == before + 2  # the data stages of its language, and the cell


def test_other_settings_are_not_done(root: Path) -> None:
    made = make(root, languages="nl", hours="2min")
    run_all(made)
    cell = made.cells[0]
    assert made.is_done(cell)
    assert not make(root, settings=("train.max_steps=7",)).is_done(cell)


def test_steps_by_amount_of_data_are_those_of_every_init(root: Path) -> None:
    made = make(root, languages="nl", hours="2min 8min", max_steps={"8min": 7})
    steps = {cell: made.config(cell).train.max_steps for cell in made.cells}
    assert {cell.init for cell in steps if cell.hours == 8 / 60} == {"en", "ml"}
    assert all((count == 7) == (cell.hours == 8 / 60) for cell, count in steps.items())
    assert all(("train.max_steps=7" in made.arguments(c)) == (steps[c] == 7) for c in steps)


def test_a_failed_cell_costs_no_other(
    root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    made = make(root)
    monkeypatch.setenv("BREAK", "ml")
    assert not run_all(made)
    done = [cell for cell in made.cells if made.is_done(cell)]
    assert {cell.init for cell in done} == {"en", "random"}
    out = capfd.readouterr().out.replace("\n", "")
    assert "broken on purpose" in out
    assert "No gap" in out
    report = (made.results / "report.md").read_text()
    assert "## Failed" in report
    assert "## Missing" in report
    monkeypatch.delenv("BREAK")
    assert run_all(made)
    assert "## Failed" not in (made.results / "report.md").read_text()


def test_from_scratch_trains_the_base_models_first(root: Path) -> None:
    made = plan.from_scratch(make(root, languages="nl"))
    assert made.results.name == "try-from-scratch"
    job = plan.base_model_jobs(made)[0]
    assert job.arguments == ("--stop-stage", "7")
    base = dict(made.config(made.cells[0]).transfer.base_models)
    end = "exp/random-all-seed1/averaged.pt"
    assert base == {"en": f"../en/{end}", "ml": f"../multilingual/{end}"}


def test_replicates_tell_the_noise(root: Path, capfd: pytest.CaptureFixture) -> None:
    repeat = {"language": "nl", "hours": "8min", "seeds": [1, 2, 3]}
    assert run_all(make(root, replicates=repeat))
    out = capfd.readouterr().out.replace("\n", " ")
    assert "Repeated with other seeds: nl at 8min" in out


def test_killed_and_continued(root: Path) -> None:
    """SIGTERM in the middle: the cells end with it, and the next sweep goes on."""
    made = make(root)
    code = (
        "import sys; from pathlib import Path; from icetransfer.sweep import local, plan\n"
        f"preset = plan.Preset.model_validate({PRESET!r})\n"
        "made = plan.Sweep('try', preset, (), Path(sys.argv[1]))\n"
        "local.run_to_the_end(made, 2, False)\n"
    )
    environment = os.environ | {"SLEEP": "60", "PYTHONPATH": str(REPO)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(root)], env=environment, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not any("--stage 3" in call for call in calls(root)):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == local.INTERRUPTED
    assert "continues where it was" in out
    assert not any(made.is_done(cell) for cell in made.cells)
    assert run_all(made)
    assert all(made.is_done(cell) for cell in made.cells)


def processes_of(root: Path) -> list[str]:
    """Command lines of all processes that were started for this repository."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            command = path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            if str(root) in command:
                found.append(command)
    return found


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_killed_outright(root: Path) -> None:
    """SIGKILL in the middle: nothing runs on, and nothing that is done is done again."""
    made = make(root)
    code = (
        "import sys; from pathlib import Path; from icetransfer.sweep import local, plan\n"
        f"preset = plan.Preset.model_validate({PRESET!r})\n"
        "local.run_to_the_end(plan.Sweep('try', preset, (), Path(sys.argv[1])), 2, False)\n"
    )
    environment = os.environ | {"SLEEP": "2", "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", code, str(root)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    lists = [root / "egs" / language / "finished" for language in ("nl", "it")]

    def finished() -> list[str]:
        return [
            line for path in lists if path.is_file() for line in path.read_text().split("\n")[:-1]
        ]

    wait_for(lambda: len(finished()) >= 3)
    process.kill()
    process.wait()
    wait_for(lambda: not processes_of(root))
    before = [cell for cell in made.cells if made.is_done(cell)]
    assert 3 <= len(before) < len(made.cells)
    assert run_all(made)
    assert all(made.is_done(cell) for cell in made.cells)
    # A cell may be killed between its result and its line.
    assert len(finished()) <= len(made.cells), "no cell was done twice"


def test_two_sweeps_at_once_do_no_cell_twice(root: Path) -> None:
    made = make(root, languages="nl", hours="2min")
    (job, *_) = plan.make_plan(made).runs
    with jobs.locked(job.status.with_suffix(".lock")) as lock:
        assert lock is not None
        assert not run_all(made)  # it leaves that cell to the other
    assert {cell.name for cell in made.cells if not made.is_done(cell)} == {job.name}


def test_stopped_by_a_signal_is_run_again(root: Path) -> None:
    made = make(root, languages="nl", hours="2min", inits="en", random_hours=())
    script = root / "egs" / "nl" / "run.sh"
    again = '[[ "$*" == *"--stop-stage 2"* ]] || mkdir again 2>/dev/null && exit 75\n'
    script.write_text(script.read_text().replace("sleep ", f"{again}sleep "))
    assert run_all(made)
    assert sum("--stage 3" in call for call in calls(root)) == 2


def test_a_stale_cell_is_put_aside(root: Path) -> None:
    made = make(root, languages="nl", hours="2min", inits="en", random_hours=())
    run_all(made)
    (cell,) = made.cells
    folder = made.experiment(cell)
    (folder / "averaged.pt").touch()
    # other decoding: what was trained stays
    target = Experiment(folder, make(root, settings=("decode.beam=8",)).config(cell))
    names = {path.name for path in jobs.put_stale_aside(target)}
    assert names == {"decode.stale-1", "config.yaml.stale-1"}
    assert (folder / "averaged.pt").is_file()
    # other training: nothing does
    (folder / "config.yaml.stale-1").rename(folder / "config.yaml")
    target = Experiment(folder, make(root, settings=("train.max_steps=7",)).config(cell))
    assert [path.name for path in jobs.put_stale_aside(target)] == ["en-2min-seed1.stale-1"]
    assert not folder.exists()


def test_planned_runs_are_what_done_means() -> None:
    made = plan.read_preset("mini", {})
    config = made.config(made.cells[0])
    tiers = {(run.chunk_size, run.precision, run.engine) for run in planned_runs(config)}
    for size in (8, 16, 32, -1):
        assert {(size, "fp32", "sherpa"), (size, "int8", "sherpa")} <= tiers
