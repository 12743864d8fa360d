"""The plan of a sweep: which cells a preset means, what is shared, and what is done already.

A cell is one run of a recipe, `egs/<language>/run.sh`.  Whether it is done is read off its saved
config and its result files, so it does not matter which engine made them, or when.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BeforeValidator, Field, ValidationError

from icetransfer import config
from icetransfer.experiment import Experiment
from icetransfer.settings.corpora import SyntheticCorpus, has_split
from icetransfer.settings.errors import describe_errors
from icetransfer.settings.section import Hours, Section
from icetransfer.settings.tree import differences
from icetransfer.sweep.jobs import Job, is_complete, read_json

REPOSITORY = Path(__file__).resolve().parents[2]
PRESETS = REPOSITORY / "egs" / "presets"
LAST_DATA_STAGE = 2  # stages 0 to 2 are shared by the cells of a language
LAST_CELL_STAGE = 10  # stage 11 packs what is handed over: for the cell that is chosen in the end
LAST_BASE_STAGE = 7  # a base model is done when its checkpoints are averaged
BASE_CHECKPOINT = "exp/random-all-seed1/averaged.pt"

Init = Literal["en", "ml", "random"]


def _listed(value: object) -> object:
    return value.split() if isinstance(value, str) else value


Words = Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)]
Amounts = Annotated[tuple[Hours, ...], BeforeValidator(_listed)]


class Replicates(Section):
    """One language and amount of data that both inits repeat with several seeds."""

    language: str
    hours: Hours
    seeds: tuple[int, ...] = Field(min_length=2)


class Preset(Section):
    """What a sweep runs."""

    languages: Words
    inits: Words = ("en", "ml")
    hours: Annotated[Amounts, Field(min_length=1)]
    random_hours: Amounts = ()  # amounts of data at which random initialisation is a control
    seeds: int = Field(1, ge=1)  # every cell is run with the seeds 1 to this number
    replicates: Replicates | None = None
    max_steps: dict[Hours, int] = Field(default_factory=dict)  # by the amount of data
    conf: tuple[str, ...] = ()  # files of every recipe over its conf/default.yaml
    settings: tuple[str, ...] = ()  # key=value for every recipe
    by_init: dict[Init, tuple[str, ...]] = Field(default_factory=dict)  # as for the control


@dataclass(frozen=True, order=True)
class Cell:
    """One experiment of the sweep."""

    language: str
    init: str
    hours: float
    seed: int

    @property
    def name(self) -> str:
        """What people read: "nl ml 8min seed 1"."""
        return f"{self.language} {self.init} {config.hours_label(self.hours)} seed {self.seed}"


@dataclass(frozen=True)
class Sweep:
    """A preset, named, with all that was changed on the command line."""

    name: str
    preset: Preset
    settings: tuple[str, ...]
    root: Path = REPOSITORY
    _configs: dict[Cell, config.Config] = field(default_factory=dict, compare=False, repr=False)

    @property
    def results(self) -> Path:
        """Where the report lies."""
        return self.root / "results" / self.name

    @cached_property
    def cells(self) -> list[Cell]:
        """All cells, those with most data first."""
        return expand(self.preset)

    @property
    def data_experiment(self) -> str:
        """The experiment, in each recipe, of the stages that all its cells share."""
        return f"exp/{self.name}/data"

    def recipe(self, language: str) -> Path:
        """The folder of a language's recipe."""
        return self.root / "egs" / language

    def arguments(self, cell: Cell) -> list[str]:
        """What the recipe's run.sh is given for the cell."""
        hours = config.hours_label(cell.hours)
        conf = [part for file in self.preset.conf for part in ("--conf", file)]
        return [
            *conf,
            *("--init", cell.init, "--hours", hours, "--seed", str(cell.seed)),
            *("--exp", f"exp/{self.name}/{cell.init}-{hours}-seed{cell.seed}"),
            *self.cell_settings(cell),
        ]

    def cell_settings(self, cell: Cell) -> list[str]:
        """The key=value settings of a cell."""
        steps = self.preset.max_steps.get(cell.hours)
        own: Sequence[str] = dict(self.preset.by_init).get(cell.init, ())  # type: ignore[call-overload]
        return [*([f"train.max_steps={steps}"] if steps else []), *self.settings, *own]

    def experiment(self, cell: Cell) -> Path:
        """The folder of the cell's experiment."""
        arguments = self.arguments(cell)
        return self.recipe(cell.language) / arguments[arguments.index("--exp") + 1]

    def config(self, cell: Cell) -> config.Config:
        """The cell's resolved config, as the recipe will save it."""
        if cell in self._configs:
            return self._configs[cell]
        recipe = self.recipe(cell.language)
        settings = [f"init={cell.init}", f"hours={config.hours_label(cell.hours)}"]
        settings += [f"seed={cell.seed}", f"language={cell.language}", *self.cell_settings(cell)]
        files = [recipe / "conf" / "default.yaml", *(recipe / file for file in self.preset.conf)]
        return self._configs.setdefault(cell, config.load_config(files, settings))

    def is_done(self, cell: Cell) -> bool:
        """Whether all results of the cell are there, from the settings of now."""
        return is_complete(Experiment(self.experiment(cell), self.config(cell)))


def read_preset(name: str, changes: dict[str, Any], root: Path = REPOSITORY) -> Sweep:
    """Reads a preset by name or file and puts changes over it.

    Args:
        name: "mini", or a YAML file.
        changes: fields of the preset from the command line; None for those not given.
        root: the repository.

    Raises:
        ValueError: the preset is unknown, or a field has a value that is not allowed.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else PRESETS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in PRESETS.glob("*.yaml")))
        raise ValueError(f"--preset {name}: {path} does not exist; known are {known}, or a file")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold the fields of a preset, such as languages and hours")
    given = {key: value for key, value in changes.items() if value is not None}
    try:
        preset = Preset.model_validate(tree | given)
    except ValidationError as error:
        more = " and the options of the command line" if given else ""
        raise ValueError(f"{path}{more}: {describe_errors(error, Preset)}") from None
    for language in preset.languages:
        if not (root / "egs" / language / "run.sh").is_file():
            known = " ".join(sorted(p.parent.name for p in (root / "egs").glob("??/run.sh")))
            raise ValueError(f"no recipe egs/{language}; there are {known}")
    wrong = sorted(set(preset.inits) - set(get_args(Init)))
    if wrong:
        raise ValueError(f"inits has {', '.join(wrong)}; expected en, ml or random")
    return Sweep(path.stem, preset, preset.settings, root)


def no_comparison(preset: Preset) -> str:
    """What is said of a sweep that compares no EN start with an ML start; empty where it does."""
    if {"en", "ml"} <= {*preset.inits}:
        return ""
    return (
        f"only {' and '.join(preset.inits)} is run: there is no gap without both en and ml, so the "
        f"report will have error rates and no answer on which start is better"
    )


def expand(preset: Preset) -> list[Cell]:
    """All cells, those with most data first: begun last, they would leave the cores idle."""
    cells = {
        Cell(language, init, hours, seed)
        for language in preset.languages
        for init in preset.inits
        for hours in preset.hours
        for seed in range(1, preset.seeds + 1)
    }
    cells |= {
        Cell(language, "random", hours, 1)
        for language in preset.languages
        for hours in preset.random_hours
        if hours in preset.hours
    }
    repeat = preset.replicates
    if repeat and repeat.language in preset.languages and repeat.hours in preset.hours:
        cells |= {
            Cell(repeat.language, init, repeat.hours, seed)
            for init in preset.inits
            if init != "random"
            for seed in repeat.seeds
        }
    return sorted(cells, key=lambda cell: (-cell.hours, cell))


def from_scratch(sweep: Sweep) -> Sweep:
    """The same sweep, with results of its own, from base models trained on this machine."""
    settings = tuple(
        f"transfer.base_models.{init}=../{recipe}/{BASE_CHECKPOINT}"
        for init, recipe in config.BASE_RECIPES.items()
    )
    name = f"{sweep.name}-from-scratch"
    return Sweep(name, sweep.preset, (*sweep.settings, *settings), sweep.root)


def available_hours(recipe: Path, data: config.Data) -> float | None:
    """Hours of training data that a recipe has; None before its stage 1 has counted them."""
    minutes = 0.0
    for name, corpus in data.corpora.items():
        if not has_split(corpus, "train"):
            continue
        prepared = recipe / data.dir / "manifests" / f"{name}_prepared.json"
        summary = read_json(prepared)
        if summary:
            minutes += summary["splits"].get("train", {}).get("minutes", 0)
        elif isinstance(corpus, SyntheticCorpus):
            minutes += corpus.minutes.train
        else:
            return None
    return minutes / 60


def too_little_data(recipe: Path, wanted: config.Config) -> str:
    """Why a cell cannot have its hours; empty when it can, or when that is not known yet."""
    available = available_hours(recipe, wanted.data)
    if wanted.hours is None or available is None or available >= wanted.hours:
        return ""
    return (
        f"{config.hours_label(wanted.hours)} wanted, and {wanted.language} has "
        f"{config.hours_label(available)} of training data"
    )


def unfair_pairs(sweep: Sweep, cells: Iterable[Cell]) -> list[str]:
    """In what the EN and the ML cell of a comparison differ besides their init.

    Both of their settings, and what their trainings noted of themselves: with other numbers of
    processes or another precision they did not take the same steps.

    Returns:
        A line for each pair that differs.
    """
    inits: dict[tuple[str, float, int], dict[str, Cell]] = {}
    for cell in cells:
        inits.setdefault((cell.language, cell.hours, cell.seed), {})[cell.init] = cell
    lines = []
    for pair in inits.values():
        if "en" in pair and "ml" in pair:
            en, ml = (sweep.config(pair[x]).model_dump(mode="json") for x in ("en", "ml"))
            found = differences(en | {"init": ""}, ml | {"init": ""})
            en, ml = (_training(sweep.experiment(pair[x])) for x in ("en", "ml"))
            noted = differences(en, ml) if en and ml else []
            if noted and all(sweep.is_done(pair[x]) for x in ("en", "ml")):  # and not to be redone
                found += noted
            if found:
                name = pair["en"].name.replace(" en ", " ")
                lines.append(f"{name}: en -> ml differ in {'; '.join(found)}")
    return lines


def _training(experiment: Path) -> dict[str, Any]:
    noted = (read_json(experiment / "provenance.json") or {}).get("train", {})
    found = {key: noted.get(key) for key in ("processes", "precision", "loss_backend", "device")}
    found["device"] = str(found["device"]).partition(":")[0]  # any GPU will do
    return {f"training's {key}": value for key, value in found.items()} if noted else {}


def check_fairness(sweep: Sweep, cells: Iterable[Cell]) -> None:
    """Refuses a plan whose EN and ML cells differ in anything but their init.

    Raises:
        ValueError: it does; the message says in what.
    """
    lines = unfair_pairs(sweep, cells)
    if lines:
        more = f"\n  and {len(lines) - 5} more" if len(lines) > 5 else ""
        raise ValueError(
            "EN and ML may differ in their init alone, or the gap means nothing:\n  "
            + "\n  ".join(lines[:5])
            + more
            + "\ngive both the same settings; an experiment that is to start again must be removed"
        )


@dataclass(frozen=True)
class Plan:
    """What is left to do.

    Attributes:
        done: cells with all their results.
        skipped: cells that are not to be run, and why.
        data: the data job of each language.
        runs: the job of each cell that is left.
    """

    done: list[Cell]
    skipped: dict[Cell, str]
    data: list[Job]
    runs: list[Job]


def make_plan(sweep: Sweep) -> Plan:
    """Compares the cells of a sweep with what lies on the disk.

    Raises:
        ValueError: a setting is wrong, or a comparison would not be fair.
    """
    check_fairness(sweep, sweep.cells)
    done: list[Cell] = []
    skipped: dict[Cell, str] = {}
    data: dict[str, Job] = {}
    runs = []
    for cell in sweep.cells:
        wanted = Experiment(sweep.experiment(cell), sweep.config(cell))
        reason = too_little_data(sweep.recipe(cell.language), wanted.config)
        if is_complete(wanted):
            done.append(cell)
        elif reason:
            skipped[cell] = reason
        else:
            own = data.setdefault(cell.language, data_job(sweep, cell.language))
            runs.append(cell_job(sweep, cell, wanted.config, own))
    return Plan(done, skipped, list(data.values()), runs)


def data_job(sweep: Sweep, language: str) -> Job:
    """The stages that all cells of a language share, in an experiment of their own."""
    cell = next(cell for cell in sweep.cells if cell.language == language)
    name = sweep.data_experiment
    arguments = sweep.arguments(cell)
    arguments[arguments.index("--exp") + 1] = name
    return _job(
        sweep, "data", f"{language} data", language,
        ("--stage", "0", "--stop-stage", str(LAST_DATA_STAGE), *arguments),
        experiment=sweep.recipe(language) / name, wanted=sweep.config(cell).model_dump(mode="json"),
    )  # fmt: skip


def data_steps(sweep: Sweep, data: Job, shares: int) -> list[list[Job]]:
    """A data job in steps, of which each needs the one before: some are done by several jobs.

    Args:
        sweep: whose job it is.
        data: the `data_job`.
        shares: how many jobs check recordings and compute features side by side.

    Returns:
        The jobs of each step; the last is the data job, which does what is left.
    """
    if shares == 1:
        return [[data]]
    language, own = data.recipe.name, data.arguments[4:]

    def step(name: str, stage: int, needs: Sequence[Job], *share: str, **more: Any) -> Job:
        stages = ("--stage", str(stage), "--stop-stage", str(stage))
        return _job(
            sweep, "data", f"{language} {name}", language, (*stages, *share, *own),
            needs=tuple(job.name for job in needs), **more,
        )  # fmt: skip

    def shared(name: str, stage: int, needs: Sequence[Job]) -> list[Job]:
        return [
            step(f"{name} {number} of {shares}", stage, needs, "--share", f"{number}/{shares}")
            for number in range(1, shares + 1)
        ]

    # the first alone has the experiment, and puts aside what other settings have made
    corpora = [step("corpora", 0, (), experiment=data.experiment, wanted=data.wanted)]
    checked = shared("manifests", 1, corpora)
    manifests = [step("manifests", 1, checked)]
    computed = shared("features", 2, manifests)
    joined = [replace(data, needs=tuple(job.name for job in computed))]
    return [corpora, checked, manifests, computed, joined]


def cell_job(sweep: Sweep, cell: Cell, wanted: config.Config, data: Job) -> Job:
    """The stages of a cell's own."""
    stages = ("--stage", str(LAST_DATA_STAGE + 1), "--stop-stage", str(LAST_CELL_STAGE))
    arguments = (*stages, *sweep.arguments(cell))
    return _job(
        sweep, "cell", cell.name, cell.language, arguments,
        needs=(data.name,), experiment=sweep.experiment(cell),
        wanted=wanted.model_dump(mode="json"),
    )  # fmt: skip


def base_model_jobs(sweep: Sweep) -> list[Job]:
    """The training of both base models, which the cells then start from."""
    stages = ("--stop-stage", str(LAST_BASE_STAGE))
    return [
        _job(sweep, "base", f"base model {init}", recipe, stages)
        for init, recipe in config.BASE_RECIPES.items()
    ]


def _job(
    sweep: Sweep, kind: str, name: str, language: str, arguments: tuple[str, ...], **more: Any
) -> Job:
    folder = sweep.results
    file = name.replace(" ", "-")
    return Job(
        kind, name, sweep.recipe(language), arguments,
        log=folder / "log" / f"{file}.log", status=folder / "status" / f"{file}.json", **more,
    )  # fmt: skip
