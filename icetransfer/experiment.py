"""The experiment folder: its config, its files, its log, and where its results come from.

    python -m icetransfer.experiment --conf conf/default.yaml language=nl init=ml hours=8min
    python -m icetransfer.experiment --exp DIR --conf F.yaml --dry-run train.max_steps=500

resolves the config of YAML files and key=value words and saves it in the folder, as a recipe's
run.sh does before its stages.  Every later stage is `python -m icetransfer.<module> --exp DIR` and
reads what is saved there.  Paths in a config are relative to the recipe's folder, where stages run.
"""

import argparse
import contextlib
import json
import logging
import os
import platform
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from icetransfer import __version__, config
from icetransfer.settings.effects import Effect, effect_of
from icetransfer.settings.section import Section
from icetransfer.settings.tree import differences, read_trees
from icetransfer.stage import atomic, cost
from icetransfer.stage.command import command_parser
from icetransfer.stage.json_file import read_json
from icetransfer.stage.lock import locked
from icetransfer.stage.share import ALL, Share
from icetransfer.stage.text import read_text

log = logging.getLogger("icetransfer")

USER_ERROR = 2  # exit code of a mistake that the message explains
CHECKPOINTS = "checkpoints"
SCHEME = "scheme.json"  # in an experiment folder: see `training/scheme.py`
CALLED_FROM = "ICETRANSFER_CALLED_FROM"  # environment variable: where the user stands
INTERRUPTED = 130  # by Ctrl-C, as shells have it
RUN_AGAIN = 75  # stopped half-way with all saved; EX_TEMPFAIL of BSD's sysexits.h


@dataclass(frozen=True)
class Experiment:
    """An experiment folder and its resolved config; the contract of what lies where."""

    dir: Path
    config: config.Config

    @property
    def data_dir(self) -> Path:
        """The recipe's data, shared by its experiments."""
        return self.config.data.dir

    @property
    def manifests_dir(self) -> Path:
        """Cut manifests of every corpus and split."""
        return self.data_dir / "manifests"

    @property
    def lang_dir(self) -> Path:
        """bpe.model and tokens.txt: the experiment's own from stage 5 on, as the recipe's were."""
        own = self.dir / "lang"
        return own if (own / "bpe.model").is_file() else self.recipe_lang_dir

    @property
    def recipe_lang_dir(self) -> Path:
        """bpe.model and tokens.txt of the recipe, shared by the experiments of the same hours."""
        of_all = self.data_dir / "lang"
        if (of_all / "bpe.model").is_file():  # of an earlier version: all hours had the same tokens
            return of_all
        return of_all / config.hours_label(self.config.hours)

    @property
    def init_checkpoint(self) -> Path:
        """What training starts from."""
        return self.dir / "init.pt"

    @property
    def checkpoints_dir(self) -> Path:
        """What training writes."""
        return self.dir / CHECKPOINTS

    @property
    def scheme_path(self) -> Path:
        """What the training has decided where the config does not say: see `training/scheme.py`."""
        return self.dir / SCHEME

    @property
    def stopped_early_path(self) -> Path:
        """Holds the last step of a run that stopped before the config's."""
        return self.checkpoints_dir / "stopped-early"

    @property
    def final_step(self) -> int:
        """The step at which training ends or, after an early stop, has ended.

        Raises:
            ValueError: the file that holds it is damaged, or not there yet.
        """
        if self.stopped_early_path.is_file():
            content = read_text(self.stopped_early_path)
            if not re.fullmatch(r"[0-9]+\n?", content):
                raise ValueError(
                    f"{self.stopped_early_path} holds {content[:40]!r}, expected the last step of "
                    f"a run that stopped early: remove it and run stage 6 again, which writes it"
                )
            return int(content)
        if self.config.train.max_steps is not None:
            return self.config.train.max_steps
        if not self.scheme_path.is_file():
            raise ValueError(f"{self.scheme_path} does not exist: run stage 6, which makes it")
        decided = read_json(self.scheme_path, ["values"])["values"]
        return int(decided["max_steps"])

    @property
    def averaged_checkpoint(self) -> Path:
        """The model that is decoded and exported."""
        return self.dir / "averaged.pt"

    @property
    def language_model_dir(self) -> Path:
        """Text for language models, and what was trained on it."""
        return self.dir / "language_model"

    @property
    def language_model(self) -> Path:
        """The language model; beside it, with the suffix .onnx, what sherpa-onnx loads."""
        return self.language_model_dir / "lstm.pt"

    @property
    def decode_dir(self) -> Path:
        """One folder per test set, engine, precision, tier and search."""
        return self.dir / "decode"

    @property
    def bundle_dir(self) -> Path:
        """A folder to hand over for each latency tier."""
        return self.dir / "bundle"

    @property
    def remedy_file(self) -> Path:
        """What `icetransfer.remedy` has found, and the export heeds: see there."""
        return self.dir / "remedy.json"

    def onnx_dir(self, chunk_size: int) -> Path:
        """The exported bundle of one latency tier."""
        left = self.config.decode.left_context_frames
        return self.dir / "onnx" / config.tier_folder(chunk_size, left)


def open_experiment(directory: Path) -> Experiment:
    """Reads an experiment that `create_experiment` made.

    Raises:
        ValueError: the folder has no config.
    """
    saved = directory / "config.yaml"
    if not saved.is_file():
        raise ValueError(f"{saved} does not exist: run the recipe's run.sh, which makes it")
    try:
        return Experiment(directory, config.load_config([saved]))
    except ValueError as error:
        raise ValueError(
            f"{saved} is not what was saved there: bring it back, or remove it and "
            f"run run.sh again\n{error}"
        ) from None


def create_experiment(
    directory: Path,
    resolved: config.Config,
    origins: Mapping[str, str] | None = None,
    change: bool = False,
) -> Experiment:
    """Saves the resolved config in the folder; where one is saved, changes it as far as may be.

    The recipe's data folder is held to the config it was made with in the same way, because all
    experiments of a recipe share it.

    Args:
        directory: the experiment's.
        resolved: its config.
        origins: where the keys that are set came from, for `python -m icetransfer.config --exp`.
        change: whether the course of a training that has begun may change.

    Raises:
        ValueError: the experiment or the data folder was made with another config.
    """
    changed = check_experiment(directory, resolved, change)
    saved = directory / "config.yaml"
    if origins is not None and (changed or not saved.is_file()):
        atomic.write_text(directory / config.ORIGINS, json.dumps(origins, indent=1) + "\n")
    if changed:
        _record_change(directory, changed)
        if any(_effect(line) == "course" for line in changed):
            (directory / SCHEME).unlink(missing_ok=True)  # decided again
    if changed or not saved.is_file():
        atomic.write_text(saved, config.dump_config(resolved))
    own = resolved.data.dir / "config.yaml"
    if not own.is_file():
        atomic.write_text(own, config.dump_config(resolved.data))
    return Experiment(directory, resolved)


def check_experiment(directory: Path, resolved: config.Config, change: bool = False) -> list[str]:
    """Checks that what is saved of an experiment and its data, if anything, may have this config.

    Returns:
        The keys that change in the experiment, a line each.

    Raises:
        ValueError: the experiment or the data folder was made with another config.
    """
    data = resolved.data.dir
    fixed = [line for line in _changes(data, resolved.data, "data.") if _effect(line) == "meaning"]
    if fixed:
        raise ValueError(
            f"{data / 'config.yaml'}: this data folder was made with other settings:"
            f"{_listed(fixed)}\nuse another data.dir=D, or remove {data} to make it again"
        )
    changed = _changes(directory, resolved)
    fixed = [line for line in changed if _effect(line) == "meaning"]
    if fixed:
        raise ValueError(
            f"{directory / 'config.yaml'}: this experiment was made with other settings:"
            f"{_listed(fixed)}\nwith these it is another experiment: add --exp {directory}-2, or "
            f"remove {directory} to start again"
        )
    course = [line for line in changed if _effect(line) == "course"]
    step = _last_step(directory)
    if course and step and not change:
        raise ValueError(
            f"{directory / 'config.yaml'}: its training is at step {step}, and these change its "
            f"course:{_listed(course)}\nadd --change to go on with them, which is recorded in "
            f"{directory / 'provenance.json'}, or --exp {directory}-2 for a run of its own"
        )
    return changed


def _changes(folder: Path, tree: Section, prefix: str = "") -> list[str]:
    """The keys in which a folder's saved config differs from another, "train.lr: 0.045 -> 0.02"."""
    saved = folder / "config.yaml"
    if not saved.is_file():
        return []
    ((_, old),) = read_trees([saved], [])
    with contextlib.suppress(ValidationError):  # what does not fit is shown as a difference
        # A key that came with a later version had its default.
        old = type(tree).model_validate(old).model_dump(mode="json")
    return differences(old, tree.model_dump(mode="json"), prefix)


def _effect(line: str) -> Effect:
    return effect_of(line.partition(":")[0])


def _listed(lines: list[str]) -> str:
    return "".join(f"\n  {line}" for line in lines)


def checkpoint_steps(checkpoints_dir: Path) -> list[int]:
    """The steps that have a checkpoint in a folder, in order."""
    names = (path.name for path in checkpoints_dir.glob("checkpoint-*.pt"))
    return sorted(int(m[1]) for name in names if (m := re.fullmatch(r"checkpoint-(\d+)\.pt", name)))


def _last_step(directory: Path) -> int:
    """The step of an experiment's last checkpoint, 0 where there is none."""
    return max(checkpoint_steps(directory / CHECKPOINTS), default=0)


def _record_change(directory: Path, changed: list[str]) -> None:
    """Says in the log and in provenance.json what changes in an experiment's config, and when."""
    for line in changed:
        log.warning("%s: changed (%s): %s", directory, _effect(line), line)
    path = directory / "provenance.json"
    tree = read_json(path, ()) if path.is_file() else {}
    now = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "step": _last_step(directory)}
    tree.setdefault("changes", []).append(now | {"keys": changed})
    atomic.write_text(path, json.dumps(tree, indent=2) + "\n")


def provenance(**more: Any) -> dict[str, Any]:
    """Where a result comes from: code, versions, machine, time, and what the caller adds."""
    packages = ("torch", "lhotse", "onnxruntime", "sherpa-onnx", "sentencepiece", "numpy")
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "icetransfer": __version__,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "versions": {name: _version(name) for name in packages}
        | {"python": sys.version.split()[0]},
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **more,
    }


def write_provenance(experiment: Experiment, stage: str, **more: Any) -> None:
    """Adds the stage's provenance to the experiment's `provenance.json`."""
    path = experiment.dir / "provenance.json"
    stages = read_json(path, ()) if path.is_file() else {}
    stages[stage] = provenance(seed=experiment.config.seed, **more)
    atomic.write_text(path, json.dumps(stages, indent=2) + "\n")


def seed_everything(seed: int) -> None:
    """Seeds Python, numpy and torch (the CPU and every GPU)."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def run_stage(doc: str | None, stage: Callable[[Experiment], None]) -> None:
    """The main of a stage: `--exp DIR`, a log file, and errors of the user's in one line.

    Args:
        doc: the module's docstring, for `--help`.
        stage: what the stage does.
    """
    directory = stage_parser(doc).parse_args().exp
    run_logged(lambda: open_experiment(enter_recipe(directory)), stage)


def run_stage_in_shares(doc: str | None, stage: Callable[[Experiment, Share], None]) -> None:
    """`run_stage` of a stage that several processes can share.

    Args:
        doc: the module's docstring, for `--help`.
        stage: does a share of the work; with all of it, what is missing, and joins the shards.
    """
    parser = stage_parser(doc)
    parser.add_argument(
        "--share", type=Share.parse, default=ALL, metavar="K/N",
        help="do the Kth of N shares of the work, beside processes that do the others; afterwards "
        "the command without --share does what is missing and joins it",
    )  # fmt: skip
    args = parser.parse_args()
    run_logged(
        lambda: open_experiment(enter_recipe(args.exp)),
        lambda experiment: stage(experiment, args.share),
        shares=not args.share.is_all,
    )


# For each stage: a setting of its own, for the example in its --help.
SETTINGS = (
    *("data.dir=/disk/nl", "data.max_seconds=20", "data.features.jobs=8", "hours=100h"),
    *("data.vocab_size=200", "transfer.base_models.ml=FILE.pt", "train.max_steps=500"),
    *("train.average_fraction=0.1", "decode.precisions=[fp32,int8]", "decode.chunk_sizes=[16,32]"),
    *("decode.splits=[dev,test]", "bundle.tar=true"),
)


def stage_parser(doc: str | None, required: bool = True) -> argparse.ArgumentParser:
    """The command line of a stage: `--exp`, to which it may add options of its own."""
    parser = command_parser(doc, "docs/config.md, docs/architecture.md")
    examples = f"Examples, from anywhere:\n    {parser.prog} --exp egs/nl/exp/ml-all-seed1\n"
    if found := re.match(r"Stage (\d+)", doc or ""):
        number, setting = found[1], SETTINGS[int(found[1])]
        examples += (
            f"    egs/nl/run.sh --init ml --stage {number} --stop-stage {number} {setting}\n\n"
            f"A setting is written key=value. `python -m icetransfer.config "
            f"{setting.split('.')[0]}`\ndescribes the keys around this one, docs/config.md all of "
            f"them.\n"
        )
    parser.epilog = examples + str(parser.epilog)
    parser.add_argument("--exp", type=Path, required=required, help="experiment folder")
    return parser


def enter_recipe(directory: Path) -> Path:
    """Goes to the recipe that an experiment lies in, because paths in a config start there.

    Returns:
        The experiment's folder, seen from there; as it was where it lies in no recipe.
    """
    full = Path(os.path.abspath(directory))  # noqa: PTH100 - of a link, the place that was typed
    recipe = next((folder for folder in full.parents if (folder / "run.sh").is_file()), None)
    if recipe is None or recipe == Path.cwd():
        return directory
    os.environ.setdefault(CALLED_FROM, str(Path.cwd()))
    os.chdir(recipe)
    return full.relative_to(recipe)


def as_seen(text: object) -> str:
    """A text whose paths in the recipe's folder are those that the user can paste where he is."""
    caller = os.environ.get(CALLED_FROM)
    if caller is None or Path(caller) == Path.cwd():
        return str(text)
    place = os.path.relpath(Path.cwd(), caller)
    return re.sub(r"(?<![\w./~-])(?=(exp|data|corpus)/[\w<.])", f"{place}/", str(text))


class Terminal(logging.Formatter):
    """Lines for the terminal, with paths as the user sees them."""

    def format(self, record: logging.LogRecord) -> str:
        """The message alone."""
        return as_seen(record.getMessage())


def run_logged(
    find: Callable[[], Experiment], stage: Callable[[Experiment], None], shares: bool = False
) -> None:
    """Runs a stage on an experiment, with a lock, a log file and its cost, as `run_stage` does.

    Args:
        find: says which experiment; what it raises is reported as what the stage raises.
        stage: what is done.
        shares: whether others do their shares of it at the same time.
    """
    main(lambda: _run_logged(find(), stage, shares))


class LogFile(logging.FileHandler):
    """A log file; lines that cannot be written to it, on a full disk, end nothing."""

    is_complete = True

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Says so once, instead of logging's traceback for each line."""
        if self.is_complete:
            self.is_complete = False
            print(f"{self.baseFilename} lacks lines ({sys.exc_info()[1]})", file=sys.stderr)


def _run_logged(experiment: Experiment, stage: Callable[[Experiment], None], shares: bool) -> None:
    script = Path(sys.argv[0])
    log_file = experiment.dir / "log" / f"{script.stem}.log"
    try:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        handler = LogFile(log_file, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
    except OSError as error:  # a read-only experiment can be read all the same
        log.warning("%s is not written (%s)", log_file, error.strerror)
    with (
        _hold_folder(experiment, script, shares),
        cost.measured(log_file.with_name("cost.jsonl"), script.stem),
    ):
        stage(experiment)


def _hold_folder(
    experiment: Experiment, script: Path, shares: bool
) -> AbstractContextManager[None]:
    """Keeps others out of what a stage writes to: the recipe's data, or the experiment."""
    if script.stem == "score":  # writes nothing
        return contextlib.nullcontext()
    if script.stem == "look":  # writes to a folder of its own, also while the experiment trains
        return locked(experiment.dir / "look", script.stem, waits=False)
    if script.parent.name == "data":
        return locked(experiment.data_dir, script.stem, waits=True, shares=shares)
    return locked(experiment.dir, script.stem, waits=False)


def main(run: Callable[[], None]) -> None:
    """Runs a command: log lines to the terminal, a user's mistake as one message, exit code 2."""
    terminal = logging.StreamHandler()
    terminal.setFormatter(Terminal())
    log.addHandler(terminal)
    log.setLevel(logging.INFO)
    log.propagate = False  # some libraries give the root logger a handler: a line would come twice
    try:
        run()
    except (ValueError, OSError) as error:
        log.error("error: %s", error)
        log.debug("", exc_info=True)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # once more ends it at once
        log.error("interrupted: what is finished is kept, and the same command goes on from there")
        sys.exit(INTERRUPTED)


def _git(*args: str) -> str | None:
    try:
        return subprocess.run(
            ["git", *args],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # a source archive, or no git: say so by None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _resolve() -> None:
    parser = command_parser(__doc__, "docs/config.md")
    parser.add_argument("--exp", type=Path, help="experiment folder (default exp/<its name>)")
    parser.add_argument("--conf", type=Path, action="append", default=[], help="YAML file")
    parser.add_argument("--dry-run", action="store_true", help="check, and write nothing")
    parser.add_argument(
        "--change", action="store_true", help="let settings change a training that has begun"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()

    def run() -> None:
        resolved = config.load_config(args.conf, args.overrides)
        directory = args.exp or Path("exp") / resolved.name
        if args.dry_run:
            check_experiment(directory, resolved, args.change)
        else:
            origins = config.origins(args.conf, args.overrides)
            create_experiment(directory, resolved, origins, args.change)
        print(directory, resolved.data.dir, sep="\n")

    main(run)


if __name__ == "__main__":
    _resolve()
