"""Stage 10: what was recognised against what was said; prints every result of the experiment.

    python -m icetransfer.score --exp DIR          a column for each latency; --full: every number
    python -m icetransfer.score --compare A/recogs.jsonl B/recogs.jsonl   who wins, how surely

WER is 100 (insertions + deletions + substitutions) / words of the reference, over all utterances
together, by kaldialign's Levenshtein alignment.  CER is the same over characters, the spaces
between words among them; a letter with the marks on it is one.  Where a language's script has no
spaces between words, its words are its characters: CER is what is printed and compared.
One normaliser (`data/text/normalizer.py`) has been over reference and hypothesis; `raw_wer` in
wer.json is that of the text as it came.
A recording that could not be recognised counts with all its words deleted, and stands in `failed`.
Intervals are of 95 %, by a bootstrap over speakers or sentences (`significance.py`).
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import kaldialign
from rich.table import Table

from icetransfer.analysis import significance
from icetransfer.analysis.collapse import has_collapsed
from icetransfer.config import Config, chunk_label, tier_folder
from icetransfer.data.text.characters import graphemes
from icetransfer.data.text.normalizer import raw
from icetransfer.experiment import (
    Experiment,
    as_seen,
    enter_recipe,
    log,
    main,
    open_experiment,
    run_logged,
    stage_parser,
)
from icetransfer.settings.corpora import has_split
from icetransfer.settings.robustness import CONDITIONS
from icetransfer.stage.command import command_parser, printer, slim_table
from icetransfer.stage.json_file import read_json

NO_WORD = "*"  # in alignments; normalised text has no such word
TOP = 30  # confusions listed in errs.txt
TORCH_PRECISIONS = ("fp32",)
CONDITION_MARK = "@"  # in the name of a test set that is changed, before that of the condition
LATENCY_COLUMNS = ("word, ms", "95 %, ms", "first word, ms", "last word, ms", "first token, ms")


class Row(TypedDict):
    """A line of recogs.jsonl."""

    id: str
    speaker: str
    ref: str
    hyp: str
    raw_ref: str  # as the corpus has it
    raw_hyp: str  # as the model said it
    audio_seconds: float
    tokens: list[int]
    timestamps: list[float]  # seconds
    failed: str | None  # why there is no hypothesis


@dataclass(frozen=True)
class Counts:
    """Errors of hypotheses against references, in words or in characters."""

    insertions: int
    deletions: int
    substitutions: int
    length: int  # of the references

    @property
    def errors(self) -> int:
        """All errors."""
        return self.insertions + self.deletions + self.substitutions

    @property
    def rate(self) -> float:
        """Errors in percent of the references' length."""
        return 100 * self.errors / self.length


def count_errors(pairs: Iterable[tuple[Sequence[str], Sequence[str]]]) -> Counts:
    """Adds up the errors of (reference, hypothesis) pairs of words or of characters.

    Raises:
        ValueError: the references hold nothing, so that there is no rate.
    """
    insertions = deletions = substitutions = length = 0
    for ref, hyp in pairs:
        found = kaldialign.edit_distance(list(ref), list(hyp))
        insertions += found["ins"]
        deletions += found["del"]
        substitutions += found["sub"]
        length += len(ref)
    if length == 0:
        raise ValueError("no error rate: every reference is empty; check the test set's text")
    return Counts(insertions, deletions, substitutions, length)


def word_errors(rows: Sequence[Row]) -> Counts:
    """Errors in words."""
    return count_errors((row["ref"].split(), row["hyp"].split()) for row in rows)


def raw_word_errors(rows: Sequence[Row]) -> Counts:
    """Errors in words of the corpus's own text, with its case, punctuation and digits."""
    return count_errors((raw(row["raw_ref"]).split(), raw(row["raw_hyp"]).split()) for row in rows)


def character_errors(rows: Sequence[Row]) -> Counts:
    """Errors in characters, spaces between words included."""
    return count_errors((graphemes(row["ref"]), graphemes(row["hyp"])) for row in rows)


def hotword_counts(rows: Sequence[Row], phrases: Iterable[str]) -> dict[str, int]:
    """How often phrases were said and heard, said and not heard, heard and not said."""
    found = missed = made_up = 0
    pairs = [(f" {row['ref']} ", f" {row['hyp']} ") for row in rows]
    for phrase in {f" {phrase} " for phrase in phrases}:
        for ref, hyp in pairs:
            said, heard = (_occurrences(text, phrase) for text in (ref, hyp))
            found += min(said, heard)
            missed += max(0, said - heard)
            made_up += max(0, heard - said)
    return {"hotwords_found": found, "hotwords_missed": missed, "hotwords_made_up": made_up}


def _occurrences(text: str, phrase: str) -> int:
    """Of words with a space on each side, which two that follow each other share."""
    return sum(text.startswith(phrase, at) for at in range(len(text) - len(phrase) + 1))


@dataclass(frozen=True)
class Decoding:
    """One way of decoding one test set, and the name of its folder."""

    test_set: str
    engine: str
    precision: str
    chunk_size: int
    left_context_frames: int
    search: str

    @property
    def order(self) -> tuple[str, str, str, float, str]:
        """What results are sorted by; offline is the longest latency."""
        latency = math.inf if self.chunk_size == -1 else self.chunk_size
        return self.test_set, self.engine, self.precision, latency, self.search

    def folder(self, decode_dir: Path) -> Path:
        """Where its recogs.jsonl, errs.txt and wer.json lie."""
        tier = tier_folder(self.chunk_size, self.left_context_frames)
        return decode_dir / self.test_set / f"{self.engine}-{self.precision}-{tier}-{self.search}"


class TestSet(NamedTuple):
    """A set that is decoded: its manifest's name, and the language whose text rules hold."""

    manifest: str
    language: str


def test_sets(config: Config) -> dict[str, TestSet]:
    """Each set that the config asks to decode, by its name.

    A test split has its corpus's name, a dev split "<corpus>-dev".
    """
    return {
        corpus if split == "test" else f"{corpus}-{split}": TestSet(
            f"{corpus}_{split}.jsonl.gz", settings.language or config.language
        )
        for split in config.decode.splits
        for corpus, settings in config.data.corpora.items()
        if has_split(settings, split)
    }


def planned_runs(config: Config) -> list[Decoding]:
    """All that the config asks to decode; torch decodes fp32 alone."""
    decode = config.decode
    return [
        Decoding(test_set, engine, precision, size, decode.left_context_frames, decode.search)
        for test_set in test_sets(config)
        for engine in decode.engines
        for precision in decode.precisions
        if engine != "torch" or precision in TORCH_PRECISIONS
        for size in decode.chunk_sizes
    ]


def errors_text(rows: Sequence[Row], title: str, by_character: bool = False) -> str:
    """The readable errs.txt: totals, failures, frequent confusions, every utterance aligned."""
    if by_character:
        lines = [title, "", _summary("CER", word_errors(rows), "characters")]
    else:
        lines = [title, "", _summary("WER", word_errors(rows), "words")]
        lines += [_summary("CER", character_errors(rows), "characters")]
    failed = [row for row in rows if row["failed"]]
    lines += ["", f"failed recordings: {len(failed)}"]
    lines += [f"  {row['id']}: {row['failed']}" for row in failed]
    aligned = {
        row["id"]: kaldialign.align(row["ref"].split(), row["hyp"].split(), NO_WORD) for row in rows
    }
    confusions = Counter(
        (ref, hyp) for pairs in aligned.values() for ref, hyp in pairs if ref != hyp
    )
    for name, chosen in (
        ("substitutions", lambda ref, hyp: NO_WORD not in (ref, hyp)),
        ("deletions", lambda ref, hyp: hyp == NO_WORD),
        ("insertions", lambda ref, hyp: ref == NO_WORD),
    ):
        of_kind = [(pair, count) for pair, count in confusions.most_common() if chosen(*pair)]
        lines += ["", f"most frequent {name} (of {sum(count for _, count in of_kind)}):"]
        for (ref, hyp), count in of_kind[:TOP]:
            word = f"{ref} -> {hyp}" if name == "substitutions" else hyp if ref == NO_WORD else ref
            lines.append(f"{count:6d}  {word}")
    lines += ["", f"utterances, most errors first ({NO_WORD}: no word):"]
    worst = sorted(rows, key=lambda row: (-sum(r != h for r, h in aligned[row["id"]]), row["id"]))
    for row in worst:
        errors = sum(ref != hyp for ref, hyp in aligned[row["id"]])
        lines += ["", f"{row['id']} ({errors} errors)", *_aligned_lines(aligned[row["id"]])]
    return "\n".join(lines) + "\n"


def _summary(name: str, counts: Counts, unit: str) -> str:
    return (
        f"{name} {counts.rate:.2f} %: {counts.errors} errors in {counts.length} {unit} "
        f"({counts.insertions} insertions, {counts.deletions} deletions, "
        f"{counts.substitutions} substitutions)"
    )


def _aligned_lines(pairs: list[tuple[str, str]]) -> list[str]:
    """Reference over hypothesis in columns, errors in capitals."""
    top, bottom = [], []
    for ref, hyp in pairs:
        if ref != hyp:
            ref, hyp = ref.upper(), hyp.upper()
        width = max(len(ref), len(hyp))
        top.append(ref.ljust(width))
        bottom.append(hyp.ljust(width))
    return [("  ref: " + " ".join(top)).rstrip(), ("  hyp: " + " ".join(bottom)).rstrip()]


def read_result(path: Path) -> dict[str, Any]:
    """Reads a wer.json.

    Raises:
        ValueError: it is damaged, lacks what a table shows, or has no numbers there.
    """
    numbers = ("wer", "cer", "insertions", "deletions", "substitutions", "words", "failed", "rtf")
    names = Decoding.__dataclass_fields__
    result: dict[str, Any] = read_json(path, [*names, *numbers, "model_bytes"])
    for key in (*numbers, "model_bytes", "chunk_size", "left_context_frames"):
        if not isinstance(result[key], int | float):
            raise ValueError(
                f"{path}: {key} is {result[key]!r}, expected a number: decode it again"
            )
    return result


def read_rows(path: Path) -> list[Row]:
    """Reads recogs.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tier_name(chunk_size: int) -> str:
    """A latency tier in a column's head: "320 ms", or "offline"."""
    return chunk_label(chunk_size).partition(" (")[0]


def _found(experiment: Experiment) -> tuple[dict[Path, Decoding], dict[Path, dict[str, Any]], bool]:
    """The runs by their folders, planned or not; their results; and whether CER is the score."""
    paths = experiment.decode_dir.glob("*/*/wer.json")
    results = {path.parent: read_result(path) for path in paths}
    runs = {run.folder(experiment.decode_dir): run for run in planned_runs(experiment.config)}
    for folder, result in results.items():  # and what was not planned
        if "condition" not in result:
            runs.setdefault(folder, _decoding_of(result))
    ordered = dict(sorted(runs.items(), key=lambda item: item[1].order))
    return ordered, results, any(found.get("unit") == "character" for found in results.values())


def short_table(experiment: Experiment) -> tuple[Table, int]:
    """Error rates alone, a column for each latency, and how many planned runs have none."""
    runs, results, by_character = _found(experiment)
    table = slim_table(
        f"{experiment.config.language}, {experiment.config.name}: "
        f"{'CER' if by_character else 'WER'} %, ± half of its 95 % interval"
    )
    searches = {run.search for run in runs.values()}
    for column in ("test set", "precision", "engine", *(["search"] if len(searches) > 1 else [])):
        table.add_column(column)
    sizes = sorted(
        {run.chunk_size for run in runs.values()}, key=lambda size: math.inf if size == -1 else size
    )
    for size in sizes:
        table.add_column(tier_name(size), justify="right")
    rows: dict[tuple[str, ...], dict[int, str]] = {}
    missing = 0
    for folder, run in runs.items():
        names = (run.test_set, run.precision, run.engine, *([run.search][: len(searches) - 1]))
        missing += folder not in results
        cell = _rate(results[folder], folder / "recogs.jsonl") if folder in results else "–"
        rows.setdefault(names, {})[run.chunk_size] = cell
    for names, cells in rows.items():
        table.add_row(*names, *(cells.get(size, "") for size in sizes))
    return table, missing


def _rate(result: dict[str, Any], recogs: Path) -> str:
    """A cell of the short table; "!" where recordings failed."""
    text = f"{result['wer']:.1f}"
    if recogs.is_file():
        low, high = significance.wer_interval(significance.read_utterances(recogs)) or (0, 0)
        text += f" ±{(high - low) / 2:.1f}" if high > low else ""
    return f"{text} !" if result["failed"] else text


def results_table(experiment: Experiment) -> tuple[Table, int]:
    """A table of all results, and how many planned runs have none."""
    runs, results, by_character = _found(experiment)
    label = f"{experiment.config.language}, {experiment.config.name}"
    table = Table(title=f"{label} ({as_seen(experiment.dir)})")
    for column in ("test set", "engine", "precision", "latency", "search"):
        table.add_column(column)
    for column in (
        *(("CER %", "95 % interval") if by_character else ("WER %", "95 % interval", "CER %")),
        "ins",
        "del",
        "sub",
        "characters" if by_character else "words",
        "failed",
        "RTF",
        "MB",
        *(LATENCY_COLUMNS if experiment.config.decode.latency else ()),
    ):
        table.add_column(column, justify="right")
    missing = 0
    for folder, run in runs.items():
        names = [run.test_set, run.engine, run.precision, chunk_label(run.chunk_size), run.search]
        if folder not in results:
            missing += 1
            table.add_row(*names, "[red]not decoded[/red]")
            continue
        numbers = _numbers(results[folder], folder / "recogs.jsonl", by_character)
        if experiment.config.decode.latency:
            numbers += latency_cells(results[folder])
        table.add_row(*names, *numbers)
    return table, missing


def condition_results(experiment: Experiment) -> list[dict[str, Any]]:
    """What `icetransfer.robustness` has found: wer.json files, by test set, tier and condition."""
    names = {name: number for number, name in enumerate(CONDITIONS)}
    paths = experiment.decode_dir.glob(f"*{CONDITION_MARK}*/*/wer.json")
    found = [result for path in paths if "condition" in (result := read_result(path))]
    for result in found:
        result["test_set"] = result["test_set"].rpartition(CONDITION_MARK)[0]

    def order(result: dict[str, Any]) -> tuple[Any, ...]:
        condition = result["condition"]
        known = names.get(condition, len(names))
        return result["test_set"], result["chunk_size"], result["engine"], known, condition

    return sorted(found, key=order)


CONDITION_COLUMNS = (
    *("test set", "latency", "condition", "WER %", "as it is", "more", "ins", "del", "sub"),
    "unchanged",
)


def condition_cells(result: dict[str, Any]) -> list[str]:
    """What stands under `CONDITION_COLUMNS`, of one of the `condition_results`."""
    return [
        result["test_set"],
        chunk_label(result["chunk_size"]),
        result["condition"],
        f"{result['wer']:.2f}",
        f"{result['clean_wer']:.2f}",
        f"{result['wer'] - result['clean_wer']:+.2f}",
        *(str(result[key]) for key in ("insertions", "deletions", "substitutions", "unchanged")),
    ]


SPELLED_OUT = 4  # fewer results than these are named in a warning
SHORT_CONDITIONS = 6  # columns of the table that fits a terminal


def conditions_table(experiment: Experiment, full: bool) -> Table | None:
    """A table of the WER under each condition, all columns or few; None where there is none."""
    results = condition_results(experiment)
    if not results:
        return None
    run = results[0]
    title = f"as if recorded elsewhere ({run['engine']}, {run['precision']})"
    table = Table(title=title) if full else slim_table(title)
    count = len(CONDITION_COLUMNS) if full else SHORT_CONDITIONS
    for number, column in enumerate(CONDITION_COLUMNS[:count]):
        name = "CER %" if column == "WER %" and run.get("unit") == "character" else column
        table.add_column(name, justify="left" if number < 3 else "right")
    for result in results:
        cells = condition_cells(result)[:count]
        cells[1] = cells[1] if full else tier_name(result["chunk_size"])
        table.add_row(*cells)
    return table


def count_differing_tokens(paths: Sequence[Path]) -> tuple[int, int]:
    """Compares what several engines recognised with the same model.

    Args:
        paths: a recogs.jsonl of each, of the same test set.

    Returns:
        How many utterances do not have the same tokens in all of them, and how many there are.
    """
    tokens: dict[str, set[tuple[int, ...]]] = {}
    for path in paths:
        for row in read_rows(path):
            tokens.setdefault(row["id"], set()).add(tuple(row["tokens"]))
    return sum(len(found) > 1 for found in tokens.values()), len(tokens)


def agreement(experiment: Experiment, full: bool = True) -> list[str]:
    """A line for each test set, precision, tier and search that several engines have decoded.

    Without `full`, one line for all of them where the engines agree in every utterance.
    """
    groups: dict[Decoding, dict[str, Path]] = {}
    for run in sorted(planned_runs(experiment.config), key=lambda run: run.order):
        path = run.folder(experiment.decode_dir) / "recogs.jsonl"
        if path.is_file():
            groups.setdefault(replace(run, engine=""), {})[run.engine] = path
    lines = []
    equal = 0
    for run, paths in groups.items():
        if len(paths) > 1:
            differing, total = count_differing_tokens([*paths.values()])
            equal += not differing
            lines.append(
                f"{run.test_set}, {run.precision}, {chunk_label(run.chunk_size)}: the same tokens "
                f"from {', '.join(paths)} in {total - differing} of {total} utterances"
            )
    if not full and 1 < len(lines) == equal:
        return ["the engines have the same tokens in every utterance that several decoded"]
    return lines


def costs_above_margin(experiment: Experiment) -> list[str]:
    """A line for each result whose precision costs more WER than `remedy` in the config allows."""
    results = {}
    for run in sorted(planned_runs(experiment.config), key=lambda run: run.order):
        path = run.folder(experiment.decode_dir) / "wer.json"
        if path.is_file():
            results[run] = read_json(path, ["wer"])
    lines = []
    for run, result in results.items():
        full = results.get(replace(run, precision="fp32"))
        margin = getattr(experiment.config.remedy, run.precision, None)
        if full and margin is not None and result["wer"] - full["wer"] > margin:
            lines.append(
                f"{run.test_set}, {run.engine}, {chunk_label(run.chunk_size)}: {run.precision} "
                f"costs {result['wer'] - full['wer']:.2f} WER points ({result['wer']:.2f} against "
                f"{full['wer']:.2f}, {full['words']} words), more than {margin:g}; "
                f"python -m icetransfer.remedy --exp {experiment.dir} looks for the layers to blame"
            )
    return lines


def collapsed_results(experiment: Experiment) -> list[str]:
    """The results of a model that says next to nothing, named as the table names them."""
    found = []
    for run in sorted(planned_runs(experiment.config), key=lambda run: run.order):
        path = run.folder(experiment.decode_dir) / "wer.json"
        if path.is_file():
            result = read_json(path, ["wer"])
            if has_collapsed(result):
                found.append(
                    f"{run.test_set}, {run.engine}, {run.precision}, {chunk_label(run.chunk_size)}"
                )
    return found


def _decoding_of(result: dict[str, Any]) -> Decoding:
    return Decoding(**{key: result[key] for key in Decoding.__dataclass_fields__})


def _numbers(result: dict[str, Any], recogs: Path, by_character: bool) -> list[str]:
    failed = str(result["failed"])
    bounds = None
    if recogs.is_file():
        bounds = significance.wer_interval(significance.read_utterances(recogs))
    return [
        f"{result['wer']:.2f}",
        f"{bounds[0]:.2f} to {bounds[1]:.2f}" if bounds else "",
        *(() if by_character else (f"{result['cer']:.2f}",)),
        *(str(result[key]) for key in ("insertions", "deletions", "substitutions", "words")),
        f"[red]{failed}[/red]" if result["failed"] else failed,
        f"{result['rtf']:.4f}",
        f"{result['model_bytes'] / 1e6:.2f}",
    ]


def latency_cells(result: dict[str, Any]) -> list[str]:
    """What stands under `LATENCY_COLUMNS`; empty where it was not measured, as offline."""
    keys = ["latency_ms_median", "latency_ms_p95"]
    keys += ["first_word_ms", "last_word_ms", "first_token_ms"]
    return ["" if result.get(key) is None else f"{result[key]:.0f}" for key in keys]


def _run(experiment: Experiment, full: bool) -> None:
    table, missing = results_table(experiment) if full else short_table(experiment)
    console = printer()
    console.print(table)
    if (conditions := conditions_table(experiment, full)) is not None:
        console.print(conditions)
    for line in agreement(experiment, full):
        console.print(line, soft_wrap=not console.is_terminal, markup=False)
    for line in costs_above_margin(experiment):
        log.warning("%s", line)
    if silent := collapsed_results(experiment):
        log.warning(
            "%s: WER over 90 %%, mostly deletions: the model says next to nothing; "
            "%s/train.log says what is wrong, docs/troubleshooting.md what to change",
            ", ".join(silent) if len(silent) < SPELLED_OUT else f"{len(silent)} results",
            experiment.dir / "log",
        )  # fmt: skip
    if missing:
        log.warning("%d planned results are missing: run stage 9 to decode them", missing)
    if not full:
        log.info("every number: python -m icetransfer.score --exp %s --full", experiment.dir)


def _run_comparison() -> None:
    parser = command_parser(__doc__, "docs/statistics.md, docs/measuring.md")
    parser.add_argument("--compare", type=Path, nargs=2, required=True, metavar="RECOGS")
    paths = parser.parse_args().compare

    def run() -> None:
        first, second = map(significance.read_utterances, paths)
        comparison = significance.compare(first, second)
        print(significance.describe(comparison, (str(paths[0]), str(paths[1]))))

    main(run)


if __name__ == "__main__":
    if "--compare" in sys.argv:
        _run_comparison()
    else:
        parser = stage_parser(__doc__)
        parser.add_argument("--full", action="store_true", help="every column")
        parser.add_argument("--compare", nargs=2, metavar="RECOGS", help="instead; without --exp")
        args = parser.parse_args()
        run_logged(
            lambda: open_experiment(enter_recipe(args.exp)),
            lambda experiment: _run(experiment, args.full),
        )
