"""The recipes' shell as a user types it: options, errors, copies. No training here."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from icetransfer import score
from icetransfer.config import load_config
from icetransfer.data.published import PUBLISHED
from icetransfer.settings.corpora import has_split
from icetransfer.transfer import BASE_MODELS

REPO = Path(__file__).resolve().parent.parent.parent
RECIPES = sorted(path.parent for path in REPO.glob("egs/*/run.sh"))
LANGUAGES = [path.name for path in RECIPES if path.name != "TEMPLATE"]


def body(script: Path) -> str:
    """A run.sh below its header."""
    lines = script.read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[next(i for i, line in enumerate(lines) if not line.startswith("#")) :])


def call(
    script: Path | str, *arguments: str, cwd: Path = REPO, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a script in this Python's environment."""
    here = {"VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    return subprocess.run(
        [str(script), *arguments],
        cwd=cwd,
        env=os.environ | here | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the shell of the repository, in a folder whose name wants quoting."""
    root = tmp_path / "a b's"
    shutil.copytree(REPO / "tools", root / "tools")
    for name in ("TEMPLATE", "nl"):
        folder = root / "egs" / name
        shutil.copytree(REPO / "egs" / name / "conf", folder / "conf")
        for file in ("run.sh", "README.md"):
            shutil.copy(REPO / "egs" / name / file, folder)
    shutil.copy(REPO / "requirements.txt", root)
    (root / "icetransfer").symlink_to(REPO / "icetransfer")
    return root


def test_every_recipe_has_the_same_stages() -> None:
    assert {"en", "multilingual", "nl", "it", "pl", "TEMPLATE"} <= {path.name for path in RECIPES}
    assert len({body(recipe / "run.sh") for recipe in RECIPES}) == 1
    text = body(RECIPES[0] / "run.sh")
    numbers = [int(n) for n in re.findall(r"^stage (\d+) ", text, re.M)]
    assert numbers == sorted([*range(12), 8, 9]), "exporting and decoding have two parts"
    assert "||" not in text, "that would switch `set -e` off inside a stage"


def test_every_yaml_is_valid() -> None:
    for recipe in RECIPES:
        default = recipe / "conf" / "default.yaml"
        for file in sorted((recipe / "conf").glob("*.yaml")):
            if file.name != "real.yaml":
                config = load_config([default, file], [f"language={recipe.name}"])
                assert config.data.corpora, file


@pytest.mark.parametrize("language", ["de", "es", "fr", "it", "nl", "pl", "pt", "ro"])
def test_public_corpora_are_those_that_exist_and_the_readme_says_why_others_do_not(
    language: str,
) -> None:
    folder = REPO / "egs" / language
    files = [folder / "conf/default.yaml", folder / "conf/public.yaml"]
    config = load_config(files, [f"language={language}"])
    exist = {kind for kind, corpus in PUBLISHED.items() if language in corpus.names}
    assert set(config.data.corpora) == exist
    assert all(corpus.kind == name for name, corpus in config.data.corpora.items())
    assert set(score.test_sets(config)) == exist
    assert not has_split(config.data.corpora["fleurs"], "train")
    readme = " ".join((folder / "README.md").read_text(encoding="utf-8").split())
    for kind, corpus in PUBLISHED.items():
        assert (f"`{kind}`" in readme) == (kind in exist)
        if language in corpus.absent:
            assert corpus.absent[language] in readme


def test_real_speech_replaces_the_synthetic_corpus() -> None:
    conf = REPO / "egs" / "nl" / "conf"
    settings = ["language=nl", "data.corpora.folder.path=corpus"]
    config = load_config([conf / "default.yaml", conf / "real.yaml"], settings)
    assert list(config.data.corpora) == ["folder"]


def test_the_seeds_differ_in_their_languages_only() -> None:
    trees = []
    for language in ("en", "multilingual"):
        tree = yaml.safe_load((REPO / "egs" / language / "conf" / "default.yaml").read_text())
        corpora = tree["data"].pop("corpora").values()
        sums = {
            split: sum(corpus["minutes"][split] for corpus in corpora)
            for split in ("train", "dev", "test")
        }
        trees.append(tree | {"minutes": sums, "domains": {c["domain"] for c in corpora}})
    assert trees[0] == trees[1]


def test_base_models_name_the_seeds() -> None:
    known = yaml.safe_load(BASE_MODELS.read_text(encoding="utf-8"))
    assert {"tiny-en", "tiny-ml"} <= set(known)


@pytest.mark.parametrize("language", ["nl", "en"])
def test_help_prints_header_options_and_stages(language: str, tmp_path: Path) -> None:
    done = call(REPO / "egs" / language / "run.sh", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr == ""
    header = (REPO / "egs" / language / "run.sh").read_text().splitlines()[1].removeprefix("# ")
    assert done.stdout.startswith(header)
    for text in ("--stop-stage", "key=value", "   6  fine-tune -> exp/<name>/checkpoints"):
        assert text in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bogus"], "unknown option --bogus"),
        (["--stage"], "--stage needs a value"),
        (["--stage", "six"], "--stage takes a stage from 0 to 11, got 'six'"),
        (
            ["--stage", "5", "--stop-stage", "3"],
            "no stage lies between them",
        ),
        (["--stop-stage", "12"], "--stop-stage takes a stage"),
        (["--share", "1/2", "--stage", "1"], "stages 1 and 2 alone can be shared"),
        (["--gpus", "0"], "--gpus takes a number from 1, got '0'"),
        (["--conf", "no such.yaml"], "--conf no such.yaml: there is no such file"),
        (["word"], "expected an option or key=value, got 'word'"),
        (["train.max_step=5"], "did you mean train.max_steps"),
        (["--init", "klingon"], "init"),
        (["--hours", "many"], "hours"),
        (["decode.chunk_sizes=[12]"], "multiple of 8 frames"),
    ],
)
def test_mistakes_are_named_before_any_stage(
    copy: Path, arguments: list[str], message: str
) -> None:
    done = call(copy / "egs" / "nl" / "run.sh", *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (copy / "egs" / "nl" / "data").exists()


def test_paths_with_spaces_and_quotes(copy: Path, tmp_path: Path) -> None:
    extra = tmp_path / "more settings.yaml"
    extra.write_text("train: {max_steps: 7}\n")
    recipe = copy / "egs" / "nl"
    arguments = ["--conf", extra.name, "--exp", "exp/it's mine", "--hours", "2min"]
    stages = ["--stage", "10", "--stop-stage", "10"]  # prints what is there: nothing
    done = call(recipe / "run.sh", *arguments, *stages, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = load_config([recipe / "exp" / "it's mine" / "config.yaml"])
    assert config.train.max_steps == 7
    assert config.language == "nl"
    again = call(recipe / "run.sh", *arguments, *stages, "seed=2", cwd=tmp_path)
    assert again.returncode == 2
    assert "seed: 1 -> 2" in again.stderr
    (recipe / "exp" / "it's mine" / "checkpoints").mkdir()
    (recipe / "exp" / "it's mine" / "checkpoints" / "checkpoint-5.pt").touch()
    again = call(recipe / "run.sh", *arguments, *stages, "train.lr=0.01", cwd=tmp_path)
    assert again.returncode == 2
    assert "train.lr: 0.045 -> 0.01" in again.stderr and "--change" in again.stderr
    again = call(recipe / "run.sh", *arguments, *stages, "--change", "train.lr=0.01", cwd=tmp_path)
    assert again.returncode == 0, again.stderr


def test_a_failed_stage_is_named(copy: Path) -> None:
    done = call(copy / "egs" / "nl" / "run.sh", "--stage", "7")
    assert done.returncode != 0
    assert len(re.findall("^error: ", done.stderr, re.M)) == 1, done.stderr
    assert "nl: stage 7, average" in done.stderr
    assert done.stderr.endswith("run.sh --stage 7\n"), "the line that goes on from there"
    assert "stage 8" not in done.stdout


def test_a_share_of_a_stage_and_what_is_next(copy: Path) -> None:
    run, stages = copy / "egs" / "nl" / "run.sh", ["--stage", "2", "--stop-stage", "2"]
    done = call(run, "--share", "2/3", *stages, "--dry-run", "--exp", "exp/a")
    assert (
        done.stdout.splitlines()[-1]
        == "  python -m icetransfer.data.features --exp exp/a --share 2/3"
    )
    done = call(run, "--share", "2/3", *stages)
    assert "run the recipe's earlier stages" in done.stderr
    assert done.stderr.endswith("run.sh --stage 2 --stop-stage 2 --share 2/3\n")


def test_a_dry_run_prints_the_commands_and_writes_nothing(copy: Path) -> None:
    recipe = copy / "egs" / "nl"
    options = ["--dry-run", "--hours", "8min", "--gpus", "2", "--exp", "exp/it's mine"]
    done = call(recipe / "run.sh", *options)
    assert done.returncode == 0, done.stderr
    commands = [line for line in done.stdout.splitlines() if line.startswith("  python -m ")]
    assert [line.split()[2] for line in commands[:3]] == [
        "icetransfer.data.download",
        "icetransfer.data.corpora",
        "icetransfer.data.features",
    ]
    assert len(commands) == 14
    assert "--nproc-per-node 2" in commands[6] and "icetransfer.train" in commands[6]
    assert all(shlex.split(line)[-2:] == ["--exp", "exp/it's mine"] for line in commands)
    assert sorted(path.name for path in recipe.iterdir()) == ["README.md", "conf", "run.sh"]
    assert call(recipe / "run.sh", "--dry-run", "train.lrr=1").returncode == 2


def test_a_run_that_ends_early_names_the_next_command(copy: Path) -> None:
    stages = ["--stop-stage", "10", "--stage", "10", "--hours", "2min"]
    done = call(copy / "egs" / "nl" / "run.sh", *stages)
    assert done.stdout.endswith("run.sh --hours 2min --stage 11\n"), done.stdout


def test_new_recipe(copy: Path) -> None:
    script = copy / "tools" / "new_recipe.sh"
    name = 'Cymraeg & "Welsh" / \\1'
    done = call(script, "cy", name)
    assert done.returncode == 0, done.stderr
    recipe = copy / "egs" / "cy"
    assert f"# {name} (cy):" in (recipe / "run.sh").read_text()
    assert body(recipe / "run.sh") == body(REPO / "egs" / "nl" / "run.sh")
    assert load_config([recipe / "conf" / "default.yaml"], ["language=cy"]).language == "cy"
    assert yaml.safe_load((recipe / "local/text.yaml").read_text())["name"] == name
    assert call(recipe / "run.sh", "--help").stdout.startswith(name)
    assert not [path for path in copy.glob("egs/.*")]
    assert "is there already" in call(script, "cy").stderr


@pytest.mark.parametrize("kind", ["fleurs", "common_voice"])
def test_a_public_corpus_is_two_lines_of_the_template(kind: str, tmp_path: Path) -> None:
    lines = (REPO / "egs/TEMPLATE/conf/default.yaml").read_text().splitlines()
    kept = [line.replace(f"# {kind}:", f"{kind}:") for line in lines if "own:" not in line]
    (tmp_path / "conf.yaml").write_text("\n".join(kept))
    config = load_config([tmp_path / "conf.yaml"], ["language=cy"])
    assert [corpus.kind for corpus in config.data.corpora.values()] == [kind]


@pytest.mark.parametrize("arguments", [["nl", "Dutch"], ["../x", "Bad"], []])
def test_new_recipe_refuses(copy: Path, arguments: list[str]) -> None:
    before = sorted(copy.glob("egs/*"))
    done = call(copy / "tools" / "new_recipe.sh", *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert sorted(copy.glob("egs/*")) == before


def without_python(folder: Path, *programs: str) -> str:
    """A PATH with a few programs and no Python."""
    folder.mkdir()
    for program in ("bash", "env", "dirname", "basename", "sha256sum", "flock", "mkdir", *programs):
        (folder / program).symlink_to(shutil.which(program) or "/bin/false")
    return str(folder)


def test_no_python(copy: Path, tmp_path: Path) -> None:
    path = without_python(tmp_path / "bin")
    done = call(copy / "egs" / "nl" / "run.sh", PATH=path, VIRTUAL_ENV="", CONDA_PREFIX="")
    assert done.returncode == 2
    assert "python3 was not found: install Python 3.10 to 3.12" in done.stderr


def test_wrong_python(copy: Path, tmp_path: Path) -> None:
    path = without_python(tmp_path / "bin")
    old = tmp_path / "bin" / "python3"
    old.write_text('#!/bin/bash\n[ "$1" != -c ] || exit 1\necho Python 3.8.1\n')
    old.chmod(0o755)
    done = call(copy / "egs" / "nl" / "run.sh", PATH=path, VIRTUAL_ENV="", CONDA_PREFIX="")
    assert done.returncode == 2
    assert "Python 3.8.1; expected Python 3.10 to 3.12" in done.stderr


def test_no_venv_module(copy: Path, tmp_path: Path) -> None:
    path = without_python(tmp_path / "bin")
    python = tmp_path / "bin" / "python3"
    python.write_text(
        '#!/bin/bash\ncase "$2" in *ensurepip*) exit 1 ;; *print*) echo python3.11-venv ;; esac\n'
    )
    python.chmod(0o755)
    done = call(copy / "egs" / "nl" / "run.sh", PATH=path, VIRTUAL_ENV="", CONDA_PREFIX="")
    assert done.returncode == 2
    assert "apt-get install python3.11-venv" in done.stderr


def test_an_environment_is_made_once_and_redone_when_killed(copy: Path, tmp_path: Path) -> None:
    """With a requirements.txt that asks for nothing: the making, not the packages."""
    (copy / "requirements.txt").write_text("# nothing\n")
    script = tmp_path / "try.sh"
    script.write_text(
        f'#!/bin/bash\nset -euo pipefail\nsource "{copy}/tools/environment.sh"\n'
        f'activate_environment "{copy}"\ncommand -v python\n'
    )
    script.chmod(0o755)
    plain = {"VIRTUAL_ENV": "", "CONDA_PREFIX": "", "PYTHONPATH": ""}
    plain["PATH"] = f"{Path(sys.executable).resolve().parent}:/usr/bin:/bin"
    first = call(script, **plain)
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip() == str(copy / ".venv" / "bin" / "python")
    assert "installing" in first.stderr
    importing = [str(copy / ".venv/bin/python"), "-c", "import icetransfer.stage.atomic"]
    subprocess.run(importing, cwd=tmp_path, env=plain, check=True)  # in any folder
    assert "installing" not in call(script, **plain).stderr
    (copy / ".venv" / ".icetransfer-requirements").unlink()  # as a killed installation leaves it
    assert "installing" in call(script, **plain).stderr


SLOW_TRAINING = """
import signal, sys, time
from pathlib import Path
def stop(*_):
    {mark}
    time.sleep(0.3)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
print("training", flush=True)
time.sleep(60)
"""


def stop_training(copy: Path, training: str, number: signal.Signals, *options: str) -> str:
    """Sends the signal to a recipe that trains; returns what it said after it left with 75."""
    (copy / "icetransfer").unlink()
    shutil.copytree(REPO / "icetransfer", copy / "icetransfer")
    (copy / "icetransfer" / "train.py").write_text(training)
    script = copy / "egs" / "nl" / "run.sh"
    here = {"VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    with subprocess.Popen(
        [script, "--stage", "6", "--stop-stage", "7", *options],
        env=os.environ | here,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell cannot trap what its caller ignores, as `pytest &` has it with Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as running:
        assert running.stdout is not None and running.stderr is not None
        while "training\n" not in (line := running.stdout.readline()):
            assert line, running.stderr.read()
        running.send_signal(number)
        assert running.wait() == 75
        return running.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_the_script_reaches_training_whose_exit_code_is_its_own(
    copy: Path, number: signal.Signals
) -> None:
    said = stop_training(copy, SLOW_TRAINING.format(mark="pass"), number)
    assert "nl: stage 6, fine-tune" in said
    assert "run the same command again to go on (exit code 75)" in said


def test_a_signal_reaches_the_processes_of_gpus_too(copy: Path) -> None:
    mark = "f = Path(sys.argv[-1]) / 'checkpoints'; f.mkdir(); (f / 'run-again').touch()"
    said = stop_training(copy, SLOW_TRAINING.format(mark=mark), signal.SIGUSR1, "--gpus", "1")
    assert "run the same command again to go on (exit code 75)" in said
