"""The reference of config keys is whole and current, and an experiment's settings have origins."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from icetransfer.config import ORIGINS, Config, load_config, origins
from icetransfer.experiment import create_experiment
from icetransfer.settings import reference
from icetransfer.settings.errors import known_keys

REPO = Path(__file__).resolve().parents[3]
KEYS = [*reference.keys(Config)]


def run(*words: str | Path, cwd: Path = REPO) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "icetransfer.config", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_every_key_has_a_line_and_a_stage() -> None:
    assert len(KEYS) > 100
    for key in KEYS:
        assert key.text.endswith("."), f"{key.name} has no sentence below it in config.py"
        assert key.stages, f"{key.name}: no stage reads it, by the table in settings/reference.py"


def test_every_key_that_a_config_takes_is_there() -> None:
    names = {key.name for key in KEYS}
    for name in known_keys(Config):
        assert name in names or any(other.startswith(f"{name}.") for other in names), name


def test_every_prefix_of_the_table_of_stages_is_that_of_a_key() -> None:
    for prefix in reference.STAGES:
        assert any(f"{key.name}.".startswith(f"{prefix}.") for key in KEYS), prefix


def test_the_page_is_current() -> None:
    page = (REPO / "docs/config.md").read_text(encoding="utf-8")
    assert page == reference.markdown(Config), (
        "run: python -m icetransfer.config --markdown > docs/config.md"
    )


@pytest.mark.parametrize(
    ("name", "kind", "default"),
    [
        ("train.chunk_sizes", "list of integer", "[8, 16, 32, -1]"),
        ("train.lr_scale", "text: number", "{}"),
        ("train.precision", "auto or fp32 or bf16 or fp16", "auto"),
        ("train.augment", "list of section", "[]"),
        ("hours", "hours", "null"),
        ("language", "text", "required"),
        ("transfer.base_models", "en or ml: text", "{en: tiny-en, ml: tiny-ml}"),
        ("decode.latency", "true or false", "false"),
    ],
)
def test_types_and_defaults(name: str, kind: str, default: str) -> None:
    (key,) = (key for key in KEYS if key.name == name)
    assert (key.type, key.default) == (kind, default)


def test_a_default_can_be_typed_as_it_is_shown() -> None:
    optional = [key for key in KEYS if key.default != "required" and ".NAME." not in key.name]
    words = [f"{key.name}={key.default}" for key in optional]
    required = ["language=nl", "data.corpora.slots.kind=synthetic"]
    assert load_config([], [*required, *words]) == load_config([], required)


def test_part_of_the_reference() -> None:
    done = run("train.mix")
    assert [line for line in done.stdout.splitlines() if not line.startswith(" ")] == [
        "train.mix.data = null",
        "train.mix.share = 0.2",
        "train.mix.unknown = characters",
    ]
    wrong = run("train.mixx")
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr == "error: no config key begins with train.mixx; did you mean train.mix?\n"


@pytest.mark.parametrize("columns", [50, 80])
def test_the_reference_is_as_wide_as_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = run().stdout.splitlines()
    texts = [line for line in lines if line.startswith(" ")]
    assert columns - 10 < max(map(len, texts)) <= columns


def test_what_an_experiment_sets_and_where_it_came_from(tmp_path: Path) -> None:
    conf = tmp_path / "own.yaml"
    tree = {
        "language": "nl",
        "data": {"corpora": {"slots": {"kind": "synthetic"}}, "dir": str(tmp_path / "data")},
        "train": {"lr": 0.02, "max_steps": 1000},  # the default, and set all the same
    }
    conf.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "icetransfer.experiment", "--exp", str(tmp_path / "exp")]
    command += ["--conf", str(conf), "train.lr=0.03", "train.freeze={encoder: 5}"]
    subprocess.run(command, check=True, capture_output=True, cwd=REPO)
    said = run("--exp", tmp_path / "exp").stdout.splitlines()
    assert said == [
        f"language = nl  ({conf})",
        f"data.dir = {tmp_path / 'data'}  ({conf})",
        f"data.corpora.slots.kind = synthetic  ({conf})",
        f"train.max_steps = 1000  ({conf})",
        "train.lr = 0.03  (the command line)",
        "train.freeze.encoder = 5  (the command line)",
    ]
    part = run("train.freeze", "--exp", tmp_path / "exp").stdout
    assert part == "train.freeze.encoder = 5  (the command line)\n"
    wrong = run("train.freze", "--exp", tmp_path / "exp")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.endswith("train.freze; did you mean train.freeze?\n")


def test_what_a_later_file_reset_is_not_set(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("train: {schedule: {warmup_steps: 20}, freeze: {encoder: 5}}\n")
    second.write_text("train: {schedule: null, freeze: null}\n")
    assert origins([first, second]) == {}
    second.write_text("train: {schedule: null, freeze: {joiner: 2}}\n")
    assert origins([first, second]) == {
        "train.freeze.encoder": str(first),
        "train.freeze.joiner": str(second),
    }


def test_a_default_that_has_changed_since_is_shown(tmp_path: Path) -> None:
    tree = ["language=nl", "data.corpora={slots: {kind: synthetic}}", "train.prune_range=7"]
    resolved = load_config([], [*tree, f"data.dir={tmp_path / 'data'}"])
    create_experiment(tmp_path / "exp", resolved, {"language": "conf/default.yaml"})
    said = run("--exp", tmp_path / "exp").stdout.splitlines()
    assert "train.prune_range = 7  (an earlier default)" in said


def test_an_experiment_of_an_earlier_version_has_no_origins(tmp_path: Path) -> None:
    tree = ["language=nl", "data.corpora={slots: {kind: synthetic}}", "train.lr=0.03"]
    create_experiment(tmp_path / "exp", load_config([], [*tree, f"data.dir={tmp_path / 'data'}"]))
    assert not (tmp_path / "exp" / ORIGINS).exists()
    said = run("--exp", tmp_path / "exp").stdout.splitlines()
    assert "train.lr = 0.03  (not recorded)" in said
    assert "data.corpora.slots.kind = synthetic  (not recorded)" in said
    assert len(said) == 4, "language, data.dir, kind and lr: no key that has its default"


def test_origins_do_not_keep_an_experiment_from_going_on(tmp_path: Path) -> None:
    tree = ["language=nl", "data.corpora={slots: {kind: synthetic}}"]
    resolved = load_config([], [*tree, f"data.dir={tmp_path / 'data'}"])
    create_experiment(tmp_path / "exp", resolved, {"language": "the command line"})
    create_experiment(tmp_path / "exp", resolved, {"language": "other.yaml"})
    kept = json.loads((tmp_path / "exp" / ORIGINS).read_text(encoding="utf-8"))
    assert kept == {"language": "the command line"}


def test_a_folder_that_is_no_experiment(tmp_path: Path) -> None:
    done = run("--exp", tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {tmp_path / 'config.yaml'} does not exist: --exp takes an experiment folder\n"
    )
