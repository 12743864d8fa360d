"""Model cards: what is to be known of a bundle, and of the two tiny base models.

    python -m icetransfer.model_card
    egs/en/run.sh --stop-stage 9 && egs/multilingual/run.sh --stop-stage 9     what it needs first

It puts the two trained base models into egs/base_models: it reads the finished runs of egs/en and
egs/multilingual (stages 0 to 9), and writes egs/base_models/{en,ml}.pt and their card.  A bundle's
card is made with the bundle, by `icetransfer.pack`.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

import icetransfer
from icetransfer import experiment
from icetransfer.config import BASE_RECIPES, chunk_label, hours_label
from icetransfer.data.published import PUBLISHED
from icetransfer.experiment import Experiment, open_experiment, provenance
from icetransfer.model.checkpoint import read_checkpoint
from icetransfer.score import CONDITION_COLUMNS, condition_cells, condition_results, planned_runs
from icetransfer.settings.corpora import SyntheticCorpus
from icetransfer.stage import atomic
from icetransfer.stage.command import command_parser
from icetransfer.stage.json_file import read_json
from icetransfer.stage.markdown import markdown_table
from icetransfer.stage.stamp import sha256
from icetransfer.streaming.exported import Exported
from icetransfer.training.scheme import settle

REPOSITORY = Path(__file__).resolve().parent.parent
RUN = Path("exp/random-all-seed1")
MAX_BYTES = 4_000_000  # they lie in the repository
RESULT: dict[str, Callable[[dict[str, Any]], str]] = {  # columns of the model card
    "test set": lambda r: r["test_set"],
    "engine": lambda r: r["engine"],
    "precision": lambda r: r["precision"],
    "WER %": lambda r: f"{r['wer']:.2f}",
    "CER %": lambda r: f"{r['cer']:.2f}",
    "deletions": lambda r: str(r["deletions"]),
    "insertions": lambda r: str(r["insertions"]),
    "words": lambda r: str(r["words"]),
    "MB": lambda r: f"{r['model_bytes'] / 1e6:.2f}",
}


def read_base_model(root: Path, name: str) -> tuple[Experiment, list[dict[str, Any]]]:
    """The finished run of a base model and its results.

    Args:
        root: the repository.
        name: "en" or "ml".

    Returns:
        The experiment, and the wer.json of every set and tier.

    Raises:
        ValueError: the run is not finished, or its model is too large to lie in the repository.
    """
    run = open_experiment(root / "egs" / BASE_RECIPES[name] / RUN)
    paths = [planned.folder(run.decode_dir) / "wer.json" for planned in planned_runs(run.config)]
    missing = [path for path in (run.averaged_checkpoint, *paths) if not path.is_file()]
    if missing:
        raise ValueError(
            f"{missing[0]} does not exist: run egs/{BASE_RECIPES[name]}/run.sh --stop-stage 9, "
            f"which makes it"
        )
    size = run.averaged_checkpoint.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(
            f"{run.averaged_checkpoint} has {size} bytes; at most {MAX_BYTES} were expected of a "
            f"file in the repository: make transfer.size smaller"
        )
    results = [read_json(path) for path in paths]
    digest = sha256(run.averaged_checkpoint)
    if any(result["checkpoint_sha256"] != digest for result in results):
        raise ValueError(
            f"{run.decode_dir} is not of {run.averaged_checkpoint} as it is now: run stage 9 again"
        )
    return run, results


def publish(root: Path) -> None:
    """Copies the base models of both runs into egs/base_models and writes their card."""
    found = {name: read_base_model(root, name) for name in BASE_RECIPES}
    folder = root / "egs" / "base_models"
    for name, (run, _) in found.items():
        with atomic.atomic_path(folder / f"{name}.pt") as temporary:
            shutil.copyfile(run.averaged_checkpoint, temporary)
    facts = [_facts(name, run) for name, (run, _) in found.items()]
    rows = [[key, *(str(fact[key]) for fact in facts)] for key in facts[0]]
    errors = {name: _errors(results) for name, (_, results) in found.items()}
    keys = dict.fromkeys(key for table in errors.values() for key in table)
    lines = [[*key, *(errors[name].get(key, "") for name in BASE_RECIPES)] for key in keys]
    card = [
        "# Model card: the base models of the mini preset",
        "Two tiny streaming Zipformer transducers, trained from nothing on synthetic speech by the "
        "same recipe: `en.pt` on English, `ml.pt` on several other languages. They exist so that "
        "`./run_all.sh` can start at once and show every step from a base model to a report; they "
        "know nothing of real speech and recognise nothing of use. Made by "
        "`python -m icetransfer.model_card`; trained again by `./run_all.sh --from-scratch`.",
        markdown_table(["", *BASE_RECIPES], rows).rstrip(),
        "WER / CER in percent on their own languages' synthetic speech, other sentences and other "
        "voices than in training:",
        markdown_table(["set", "latency", *BASE_RECIPES], lines).rstrip(),
        "Licence: that of this repository. The speech was made by espeak-ng (GPL-3.0), which is "
        "not part of the models.",
    ]
    atomic.write_text(folder / "README.md", "\n\n".join(card) + "\n")
    print(f"-> {folder}")


def _facts(name: str, run: Experiment) -> dict[str, str | int]:
    config = run.config
    stages = read_json(run.dir / "provenance.json", ["train"])
    train = stages["train"]
    corpora = [c for c in config.data.corpora.values() if isinstance(c, SyntheticCorpus)]
    languages = sorted({corpus.language or config.language for corpus in corpora})
    minutes = sum(corpus.minutes.train for corpus in corpora)
    dims, weights, _ = read_checkpoint(run.averaged_checkpoint)
    return {
        "languages": " ".join(languages),
        "speech": f"{minutes:g} minutes, each at {len(config.data.features.speeds)} speeds",
        "command": f"`egs/{BASE_RECIPES[name]}/run.sh`",
        "icetransfer": stages["transfer"].get("icetransfer", "before 0.2.0"),
        "commit": _commit(stages["transfer"]),
        "steps": f"{run.final_step} of {settle(run).config.train.batch_seconds:g} s",
        "training time": f"{train['seconds'] / 60:.0f} minutes, {config.train.threads} thread",
        "parameters": sum(value.numel() for value in weights.values()),
        "tokens": dims.vocab_size,
        "trained at": ", ".join(chunk_label(size) for size in dims.chunk_sizes),
        "bytes": run.averaged_checkpoint.stat().st_size,
        "sha256": f"`{sha256(run.averaged_checkpoint)}`",
    }


def _errors(results: list[dict[str, Any]]) -> dict[tuple[str, str], str]:
    """WER and CER by split and latency, over the languages' sets together."""
    sums: dict[tuple[str, str], list[int]] = {}
    for result in results:
        split = "dev" if result["test_set"].endswith("-dev") else "test"
        total = sums.setdefault((split, chunk_label(result["chunk_size"])), [0, 0, 0, 0])
        for index, key in enumerate(("errors", "words", "character_errors", "characters")):
            total[index] += result[key]
    return {
        key: f"{100 * errors / words:.1f} / {100 * char_errors / chars:.1f}"
        for key, (errors, words, char_errors, chars) in sums.items()
    }


def read_results(experiment: Experiment, chunk_size: int) -> list[dict[str, Any]]:
    """The wer.json of a tier's runs that are there."""
    runs = (run for run in planned_runs(experiment.config) if run.chunk_size == chunk_size)
    paths = [run.folder(experiment.decode_dir) / "wer.json" for run in runs]
    return [read_json(path) for path in paths if path.is_file()]


def bundle_card(experiment: Experiment, source: Exported, chunk_size: int) -> str:
    """MODEL_CARD.md: base model, data, errors by precision, licences, provenance."""
    config = experiment.config
    exported = read_json(source.description, ["made_of"])
    start = _read(experiment.dir / "transfer.json").get("base_model") or {}
    subset = _read(experiment.manifests_dir / f"subset-{hours_label(config.hours)}.json")
    facts = {
        "language": config.language,
        "latency": chunk_label(chunk_size),
        "left context": "all"
        if chunk_size == -1
        else f"{config.decode.left_context_frames} frames",
        "base model": start.get("name", config.init),
        "base model's commit": start.get("huggingface", {}).get("revision", ""),
        "base model's sha256": f"`{start['sha256']}`" if "sha256" in start else "",
        "fine-tuned on": ", ".join(
            f"{name}: {found['hours']:.4g} h, {found['speakers']} speakers"
            for name, found in subset.get("corpora", {}).items()
        ),
        "training": f"{experiment.final_step} steps, seed {config.seed}",
        "search": config.decode.search,
        "checkpoint's sha256": f"`{exported['made_of']['sha256']}`",
        "icetransfer": exported["provenance"].get("icetransfer", "before 0.2.0"),
        "commit of the export": _commit(exported["provenance"]),
        "versions": ", ".join(
            f"{name} {version}" for name, version in provenance()["versions"].items()
        ),
    }
    sizes = exported["bytes"]
    made = [
        [
            precision,
            f"{sizes[precision] / 1e6:.2f}",
            f"{sizes['fp32'] / sizes[precision]:.2f}",
            _how(source, precision),
        ]
        for precision in config.decode.precisions
    ]
    results = read_results(experiment, chunk_size)
    rows = [[column(result) for column in RESULT.values()] for result in results]
    table = markdown_table([*RESULT], rows).rstrip() if rows else "not decoded: run stage 9"
    changed = [r for r in condition_results(experiment) if r["chunk_size"] == chunk_size]
    robust = markdown_table([*CONDITION_COLUMNS], [condition_cells(r) for r in changed]).rstrip()
    parts = [
        f"# Model card: {config.language}, {chunk_label(chunk_size)}",
        markdown_table(["", ""], [[key, text] for key, text in facts.items() if text]).rstrip(),
        "## Errors",
        table,
        *(("## As if recorded elsewhere", robust) if changed else ()),
        "## Files",
        markdown_table(["precision", "MB", "times smaller", "made with"], made).rstrip(),
        "## Licences",
        "\n".join(f"* {line}" for line in licences(experiment, start)),
    ]
    return "\n\n".join(parts) + "\n"


def hub_card(experiment: Experiment, chunk_sizes: Sequence[int]) -> str:
    """README.md of a repository on a model hub that holds a bundle for each of these tiers.

    The lines between the dashes are what a hub sorts models by.
    """
    config = experiment.config
    head = {
        "language": [config.language],
        "license": "other",
        "license_name": "see-the-model-cards",
        "library_name": "sherpa-onnx",
        "pipeline_tag": "automatic-speech-recognition",
        "tags": ["streaming", "zipformer", "transducer", "icetransfer"],
    }
    rows = []
    for size in chunk_sizes:
        tier = Exported(experiment.onnx_dir(size)).dir.name
        links = f"[run it]({tier}/README.md), [card]({tier}/MODEL_CARD.md)"
        for found in read_results(experiment, size) or [{}]:
            cells = (found.get("test_set", ""), found.get("engine", ""), found.get("precision", ""))
            errors = [f"{found[key]:.2f}" if found else "" for key in ("wer", "cer")]
            rows.append([chunk_label(size), *cells, *errors, links])
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# Streaming speech recognition: {config.language}",
        "Zipformer transducers for sherpa-onnx, made with icetransfer "
        f"{icetransfer.__version__}. Each folder is for one latency and runs as it lies.",
        markdown_table(
            ["latency", "test set", "engine", "precision", "WER %", "CER %", ""], rows
        ).rstrip(),
        "## Licences",
        "\n".join(
            f"* {line}"
            for line in licences(
                experiment, _read(experiment.dir / "transfer.json").get("base_model") or {}
            )
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found: dict[str, Any] = read_json(path, ())
    return found


def _commit(made: dict[str, Any]) -> str:
    """The commit of a stage's provenance, where it ran in a git checkout."""
    commit = made.get("git_commit")
    return f"`{commit}`" if commit else "not known: it was not run in a git checkout"


def _how(source: Exported, precision: str) -> str:
    settings = source.quantisation(precision)
    kept = settings.pop("kept", [])
    said = [f"{key} {value}" for key, value in settings.items()]
    return ", ".join(
        [*said, *([f"{len(kept)} layers kept higher: {' '.join(kept)}"] if kept else [])]
    )


def licences(experiment: Experiment, base_model: dict[str, Any]) -> list[str]:
    """A line for the base model and for each corpus."""
    lines = []
    if base_model:
        lines.append(f"base model {base_model['name']}: {base_model.get('licence', 'not known')}")
    for name, corpus in experiment.config.data.corpora.items():
        if corpus.kind in PUBLISHED:
            published = PUBLISHED[corpus.kind]
            lines.append(f"{published.title} ({name}): {published.licence}")
        elif isinstance(corpus, SyntheticCorpus):
            lines.append(
                f"{name}: made by espeak-ng (GPL-3.0), which is not part of the model; test.wav is "
                "its output"
            )
        else:
            lines.append(f"{name}: your own recordings; test.wav is one of them")
    return lines


def _run() -> None:
    parser = command_parser(__doc__, "egs/base_models/README.md")
    parser.parse_args()
    experiment.main(lambda: publish(REPOSITORY))


if __name__ == "__main__":
    _run()
