"""What a sweep would run: fair pairs, languages with too little data, what is stale."""

import json
import shutil
from pathlib import Path

import pytest

from icetransfer.config import dump_config
from icetransfer.score import planned_runs
from icetransfer.sweep import estimate, local, plan, status
from icetransfer.sweep.__main__ import tier_settings

REPO = Path(__file__).resolve().parents[3]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for language in ("nl", "pl"):
        conf = tmp_path / "egs" / language / "conf"
        conf.mkdir(parents=True)
        for name in ("default.yaml", "public.yaml"):
            shutil.copy(REPO / "egs" / "nl" / "conf" / name, conf)
    return tmp_path


def make(root: Path, **changes: object) -> plan.Sweep:
    preset = {"languages": ["nl", "pl"], "hours": ["2min", "8min"], **changes}
    checked = plan.Preset.model_validate(preset)
    return plan.Sweep("try", checked, checked.settings, root)


def finish(made: plan.Sweep, cell: plan.Cell, **training: object) -> None:
    folder = made.experiment(cell)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(made.config(cell)))
    (folder / "provenance.json").write_text(json.dumps({"train": training}))
    for run in planned_runs(made.config(cell)):
        target = run.folder(folder / "decode") / "wer.json"
        target.parent.mkdir(parents=True)
        target.write_text("{}")


def test_shared_work_once_for_each_language(root: Path) -> None:
    made = plan.make_plan(make(root, seeds=3))
    assert [job.name for job in made.data] == ["nl data", "pl data"]
    assert len(made.runs) == 2 * 2 * 2 * 3
    assert {job.needs for job in made.runs} == {("nl data",), ("pl data",)}


def test_a_data_job_in_shares(root: Path) -> None:
    sweep = make(root, languages=["nl"])
    (data,) = plan.make_plan(sweep).data
    assert plan.data_steps(sweep, data, 1) == [[data]]
    steps = plan.data_steps(sweep, data, 2)
    names = [[job.name for job in step] for step in steps]
    assert names == [
        ["nl corpora"],
        ["nl manifests 1 of 2", "nl manifests 2 of 2"],
        ["nl manifests"],
        ["nl features 1 of 2", "nl features 2 of 2"],
        ["nl data"],
    ]
    for before, step in zip(names, steps[1:], strict=False):
        assert [job.needs for job in step] == [tuple(before)] * len(step)
    stages = [[" ".join(job.arguments).partition(" --init")[0] for job in step] for step in steps]
    assert stages == [
        ["--stage 0 --stop-stage 0"],
        [f"--stage 1 --stop-stage 1 --share {k}/2" for k in (1, 2)],
        ["--stage 1 --stop-stage 1"],
        [f"--stage 2 --stop-stage 2 --share {k}/2" for k in (1, 2)],
        ["--stage 0 --stop-stage 2"],
    ]
    (corpora,), (last,) = steps[0], steps[-1]
    assert corpora.arguments[4:] == last.arguments[4:] == data.arguments[4:]
    assert corpora.target == data.target, "what other settings have made is put aside first"


def test_a_changed_setting_makes_exactly_the_affected_cells_stale(root: Path) -> None:
    made = make(root, max_steps={"2min": 5, "8min": 6})
    for cell in made.cells:
        finish(made, cell)
    assert not plan.make_plan(made).runs
    changed = make(root, max_steps={"2min": 5, "8min": 7})
    runs = plan.make_plan(changed).runs
    assert {job.name for job in runs} == {c.name for c in changed.cells if c.hours == 8 / 60}
    assert len(runs) == 4


def test_a_pair_that_differs_is_refused_and_said_in_what(root: Path) -> None:
    made = make(root, by_init={"ml": ("train.lr=0.01", "train.batch_seconds=20")})
    with pytest.raises(ValueError, match="init alone") as refused:
        plan.make_plan(made)
    assert "nl 2min seed 1" in str(refused.value)
    assert "train.lr: 0.045 -> 0.01" in str(refused.value)
    assert "train.batch_seconds: None -> 20.0" in str(refused.value)
    # the control is no part of the comparison
    control = make(root, random_hours=["2min"], by_init={"random": ("train.freeze={}",)})
    assert not plan.unfair_pairs(control, control.cells)


def test_a_pair_trained_on_other_numbers_of_processes_is_refused(root: Path) -> None:
    made = make(root, languages=["nl"], hours=["2min"])
    same = {"precision": "torch.bfloat16", "loss_backend": "k2"}
    for cell, processes in zip(made.cells, (1, 4), strict=True):
        finish(made, cell, processes=processes, device=f"cuda:{processes}", **same)
    with pytest.raises(ValueError, match="training's processes: 1 -> 4"):
        plan.make_plan(made)
    assert "device" not in "".join(plan.unfair_pairs(made, made.cells))


def test_too_little_data_is_skipped_and_said(root: Path) -> None:
    made = make(root, hours=["100h", "250h"], conf=["conf/public.yaml"])
    assert len(plan.make_plan(made).runs) == 8, "not known before stage 1"
    for corpus, minutes in {"mls": 6240, "common_voice": 1, "voxpopuli": 0}.items():
        path = root / f"egs/pl/data/public/manifests/{corpus}_prepared.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"splits": {"train": {"minutes": minutes}}}))
    planned = plan.make_plan(made)
    assert {cell.name for cell in planned.skipped} == {"pl en 250h seed 1", "pl ml 250h seed 1"}
    assert set(planned.skipped.values()) == {"250h wanted, and pl has 104.017h of training data"}
    assert len(planned.runs) == 6


def test_dry_run_says_commands_audio_and_disk(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make(root, languages=["nl"], hours=["30min"], settings=("data.dir=a 'b' $(c)",))
    (root / "egs" / "base_models").mkdir()
    (root / "egs" / "base_models" / "en.pt").write_bytes(bytes(1_000_000))
    estimate.print_plan(made, plan.make_plan(made))
    out = capsys.readouterr().out
    assert "egs/nl/run.sh --stage 3 --stop-stage 10 --init en --hours 30min" in out
    assert """'data.dir=a '"'"'b'"'"' $(c)'""" in out
    assert "10 h of audio, 0.028 GB of disk" in out  # twenty passes; 2 + 5 x 4 + 1.5 x 4 models
    assert "10 h of audio, an unknown amount of disk" in out  # there is no ml.pt
    assert "1 data jobs and 2 cells to do: 20.0 h of audio" in out


def test_hours_of_a_cell_at_a_measured_pace() -> None:
    made = plan.read_preset("mini", {"languages": "nl", "hours": "30min"})
    wanted = made.config(made.cells[0])  # 550 steps of 16 s; 4 tiers x 2 precisions
    pace = estimate.Pace(train=100, decode=0.01, test_hours=0.5, devices="")
    assert estimate.cell_hours(wanted, pace) == pytest.approx((550 * 16 / 3600 / 100, 8 * 0.005))


def test_tiers() -> None:
    assert tier_settings("160ms 640ms offline") == "decode.chunk_sizes=[8, 32, -1]"
    with pytest.raises(ValueError, match="160ms, or offline"):
        tier_settings("160")


@pytest.mark.parametrize(
    ("at_once", "gpus", "shares"),
    [
        (2, [], [None, None]),
        (2, ["0", "1", "2", "3"], ["0,2", "1,3"]),
        (3, ["a", "b"], ["a", "b", "a"]),
    ],
)
def test_cores_and_gpus_are_shared_out(
    at_once: int, gpus: list[str], shares: list[str | None]
) -> None:
    found = local.share_out(at_once, 8, gpus)
    assert [share.get("CUDA_VISIBLE_DEVICES") for share in found] == shares
    assert {share["OMP_NUM_THREADS"] for share in found} == {str(8 // at_once)}


def test_of_several_test_sets_each_is_decoded_so_often(root: Path) -> None:
    made = make(root, languages=["nl"], conf=["conf/public.yaml"])
    wanted = made.config(made.cells[0])  # 4 test sets, torch fp32 and sherpa fp32, int8, 4 tiers
    pace = estimate.Pace(train=100, decode=0.01, test_hours=2, devices="")
    assert estimate.cell_hours(wanted, pace)[1] == pytest.approx(3 * 4 * 2 * 0.01)


def test_a_stale_training_is_not_compared(root: Path) -> None:
    made = make(root, languages=["nl"], hours=["2min"])
    for cell, processes in zip(made.cells, (1, 4), strict=True):
        finish(made, cell, processes=processes)
    changed = make(root, languages=["nl"], hours=["2min"], settings=("train.lr=0.01",))
    assert len(plan.make_plan(changed).runs) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hours: [2min", "is not YAML"),
        ("- nl", "must hold the fields of a preset"),
        ("languages: [nl]\nhours: [2min]\nhour: 3", "hour; did you mean hours"),
        ("languages: [xx]\nhours: [2min]", "no recipe egs/xx"),
        ("languages: [nl]\nhours: [2min]\ninits: [fr]", "inits has fr; expected en, ml or random"),
    ],
)
def test_a_preset_that_is_none_says_why(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "try.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        plan.read_preset(str(path), {})


def test_one_start_alone_is_said_to_answer_nothing(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make(root, languages=["nl"], hours=["2min"], inits=["en"])
    estimate.print_plan(made, plan.make_plan(made))
    status.announce(made, plan.make_plan(made))
    assert capsys.readouterr().out.count("only en is run: there is no gap without both") == 2
    assert plan.no_comparison(make(root).preset) == ""


def test_a_plan_that_is_refused_leaves_no_folder(root: Path) -> None:
    made = make(root, languages=["nl"], hours=["2min"], settings=("train.lrr=1",))
    with pytest.raises(ValueError, match=r"did you mean train\.lr"):
        local.run_to_the_end(made, 1, False)
    assert not made.results.exists()
