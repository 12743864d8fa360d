"""The tables and remarks of a sweep's report, from the rows of its wer.json files."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from icetransfer.analysis.collapse import has_collapsed
from icetransfer.analysis.gap_report import TableData, latency_order, tier_label
from icetransfer.analysis.sweep_results import COMPARED, ENGINES, FULL
from icetransfer.config import hours_label
from icetransfer.score import count_differing_tokens

COLUMNS = (
    *("language", "init", "hours", "test_set", "chunk_ms", "precision", "wer", "cer"),
    *("engine", "seed", "words", "errors", "deletions", "utterances", "failed", "rtf"),
    *("model_bytes", "recogs"),
)
INITS = ("en", "ml", "random")
TIE = "≈"  # marks results that cannot be told apart
COLLAPSED = "†"  # marks results of a model that says next to nothing

Row = dict[str, Any]


def shipped(rows: Sequence[Row]) -> list[Row]:
    """One engine for each measurement, by the same preference as the gap's."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in sorted(rows, key=lambda r: ENGINES.index(r["engine"]), reverse=True):
        best[_measurement(row)] = row
    return list(best.values())


def _measurement(row: Row) -> tuple[Any, ...]:
    named = tuple(row[key] for key in (*COLUMNS[:6], "seed"))
    return (*named, row.get("delay_penalty", 0.0))  # which earlier results do not hold


def error_tables(rows: Sequence[Row], analysis: Row | None, bold: bool) -> dict[str, TableData]:
    """WER and CER of each precision, by title: a line for each language, init and amount of data.

    A cell repeated with several seeds stands as their mean, with its number of runs; after ± is
    half of the WER's interval. Of a language whose characters are counted, CER stands alone.

    Args:
        rows: of wer.json files.
        analysis: what gap.json holds, for ties; None without any gap.
        bold: whether the best of each comparison is marked so, as Markdown does.
    """
    tied = set()
    for row in analysis["language_gap"] if analysis else ():
        if row["ci_low"] is not None and row["ci_low"] <= 0 <= row["ci_high"]:
            tied.add(_comparison(row))
    precisions = sorted({row["precision"] for row in rows})
    return {
        f"WER / CER in percent, {precision}": _error_table(rows, precision, tied, bold)
        for precision in precisions
    }


def _comparison(row: Row) -> tuple[Any, ...]:
    """What a result is compared within."""
    keys = ("test_set", "precision", "chunk_ms", "hours", "language")
    return tuple(row[key] for key in keys)


def _error_table(
    rows: Sequence[Row], precision: str, tied: set[tuple[Any, ...]], bold: bool
) -> TableData:
    groups: dict[tuple[Any, ...], dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    compared: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for row in shipped(rows):
        if row["precision"] == precision:
            key = (row["test_set"], row["language"], row["hours"], INITS.index(row["init"]))
            groups[key][row["chunk_ms"]].append(row)
    tiers = sorted({tier for found in groups.values() for tier in found}, key=latency_order)
    for found in groups.values():
        for repeats in found.values():
            compared[_comparison(repeats[0])].append(mean(repeats, "wer"))
    best = {key: min(wers) for key, wers in compared.items() if len(wers) > 1}
    lines = []
    for test_set, language, hours, init in sorted(groups):
        found = groups[test_set, language, hours, init]
        count = max(len(repeats) for repeats in found.values())
        cells = [
            _error_cell(found[tier], best, tied, bold) if tier in found else "" for tier in tiers
        ]
        lines.append([test_set, language, hours_label(hours), INITS[init], str(count), *cells])
    return ["test set", "language", "data", "init", "runs", *map(tier_label, tiers)], lines


def _error_cell(
    repeats: Sequence[Row],
    best: dict[tuple[Any, ...], float],
    tied: set[tuple[Any, ...]],
    bold: bool,
) -> str:
    key = _comparison(repeats[0])
    wer = mean(repeats, "wer")
    text = f"{wer:.1f}"
    if bold and wer == best.get(key):
        text = f"**{text}**"
    if all(row.get("wer_ci_low") is not None for row in repeats):
        half = (mean(repeats, "wer_ci_high") - mean(repeats, "wer_ci_low")) / 2
        text += f" ± {half:.1f}"
    if repeats[0].get("unit") == "character":
        text = f"CER {text}"
    else:
        text += f" / {mean(repeats, 'cer'):.1f}"
    if any(map(has_collapsed, repeats)):
        text += f" {COLLAPSED}"
    return text + (f" {TIE}" if key in tied and repeats[0]["init"] in COMPARED else "")


def mean(rows: Sequence[Row], key: str) -> float:
    """The mean of a column."""
    return sum(float(row[key]) for row in rows) / len(rows)


def condition_table(rows: Sequence[Row]) -> TableData:
    """The WER under each condition, and without: a column for each amount of data and init."""
    cells = sorted({(row["hours"], INITS.index(row["init"])) for row in rows})
    names = dict.fromkeys(row["condition"] for row in rows)

    def line(name: str, key: str, some: Sequence[Row]) -> list[str]:
        texts = []
        for hours, init in cells:
            found = [r for r in some if (r["hours"], INITS.index(r["init"])) == (hours, init)]
            texts.append(f"{mean(found, key):.1f}" if found else "")
        return [name, *texts]

    header = ["condition", *(f"{hours_label(hours)} {INITS[init]}" for hours, init in cells)]
    lines = [line(name, "wer", [r for r in rows if r["condition"] == name]) for name in names]
    return header, [line("as they are", "clean_wer", rows), *lines] if rows else []


def size_table(rows: Sequence[Row]) -> TableData:
    """Size of the model's files and speed, means over all cells."""
    groups: dict[tuple[str, float, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["precision"], latency_order(row["chunk_ms"]), row["engine"]].append(row)
    full: dict[tuple[float, str], float] = {
        key[1:]: mean(found, "model_bytes") for key, found in groups.items() if key[0] == FULL
    }
    lines = []
    for (precision, order, engine), found in sorted(groups.items()):
        size = mean(found, "model_bytes")
        smaller = full.get((order, engine), 0) / size
        loads = [row["host_load"] for row in found if "host_load" in row]
        lines.append(
            [
                *(precision, tier_label(found[0]["chunk_ms"]), engine, f"{size / 1e6:.2f}"),
                *(f"{smaller:.2f}" if smaller else "", f"{mean(found, 'rtf'):.4f}"),
                *(f"{sum(loads) / len(loads):.1f}" if loads else "", str(len(found))),
            ]
        )
    header = ["precision", "latency", "engine", "MB", "times smaller", "RTF"]
    return [*header, "load of the machine", "cells"], lines


def latency_table(rows: Sequence[Row]) -> TableData:
    """From a word's end to its output, means over all cells that measured it."""
    groups: dict[tuple[str, float], list[Row]] = defaultdict(list)
    for row in shipped(rows):
        if row.get("latency_ms_median") is not None:
            groups[row["precision"], latency_order(row["chunk_ms"])].append(row)
    lines = []
    for (precision, _), found in sorted(groups.items()):
        parts = [row["latency_ms_parts"] for row in found]
        lines.append(
            [
                *(precision, tier_label(found[0]["chunk_ms"])),
                *(f"{mean(found, key):.0f}" for key in ("latency_ms_median", "latency_ms_p95")),
                *(
                    _known(found, key)
                    for key in ("first_word_ms", "last_word_ms", "first_token_ms")
                ),
                *(f"{mean(parts, key):.0f}" for key in ("model", "chunk", "look_ahead", "runtime")),
                *(str(sum(row["latency_words"] for row in found)), str(len(found))),
            ]
        )
    header = ["precision", "latency", "word, median ms", "word, 95 % ms"]
    header += ["first word, ms", "last word, ms", "first token, ms"]
    header += ["of it model, ms", "chunk, ms", "look-ahead, ms", "runtime, ms"]
    return [*header, "words", "cells"], lines


def _known(rows: Sequence[Row], key: str) -> str:
    """The mean of a number that earlier results do not hold."""
    found = [row for row in rows if row.get(key) is not None]
    return f"{mean(found, key):.0f}" if found else ""


def cost_table(costs: Sequence[Row]) -> TableData:
    """Device hours of every cell."""
    # reports of before stages were measured stay as they are
    measured = any(cost.get("stages") for cost in costs)
    lines = [
        [
            *(cost["language"], cost["init"], hours_label(cost["hours"]), str(cost["seed"])),
            cost["device"] or "",
            "" if cost["train_hours"] is None else f"{cost['train_hours']:.3f}",
            "" if cost["decode_hours"] is None else f"{cost['decode_hours']:.3f}",
            f"its last part, from step {cost['resumed_at_step']}"
            if cost["resumed_at_step"]
            else "",
            *(_all_stages(cost) if measured else ()),
        ]
        for cost in costs
    ]
    header = ["language", "init", "data", "seed", "device", "training, h", "decoding, h"]
    header += ["of the training"]
    if measured:
        header += ["all stages, wall h", "device h", "kWh"]
    return header, lines


def _all_stages(cost: Row) -> tuple[str, str, str]:
    """Wall time, device hours and energy of a cell, over its stages and all their runs."""
    stages = cost.get("stages", {}).values()
    energy = [stage["kwh"] for stage in stages if stage["kwh"] is not None]
    return (
        f"{sum(stage['wall_hours'] for stage in stages):.3f}",
        f"{sum(stage['device_hours'] for stage in stages):.3f}",
        f"{sum(energy):.3f}" if energy else "not counted",
    )


def remarks(rows: Sequence[Row], results: Path) -> list[str]:
    """What a reader should know besides the tables.

    Args:
        rows: of wer.json files.
        results: the folder that their `recogs` are relative to.
    """
    lines = []
    characters = sorted({row["language"] for row in rows if row.get("unit") == "character"})
    if characters:
        lines.append(
            f"The script of {', '.join(characters)} has no spaces between words, so characters are "
            f"counted: what is called WER is the CER there, also in gaps and means."
        )
    failed = sum(row["failed"] for row in rows)
    if failed:
        lines.append(f"{failed} recordings could not be recognised; each counts as all deleted.")
    agreement = _agreement(rows, results)
    if agreement:
        lines.append(agreement)
    control = _control(rows)
    if control:
        lines.append(control)
    return lines


def _agreement(rows: Sequence[Row], results: Path) -> str:
    """In how many utterances the engines that decoded the same model found the same tokens."""
    groups: dict[tuple[Any, ...], dict[str, Path]] = defaultdict(dict)
    for row in rows:
        path = results / str(row.get("recogs", ""))
        if path.is_file():
            groups[_measurement(row)][row["engine"]] = path
    several = {key: found for key, found in groups.items() if len(found) > 1}
    if not several:
        return ""
    counts = [count_differing_tokens([*found.values()]) for found in several.values()]
    differing, total = (sum(column) for column in zip(*counts, strict=True))
    engines = sorted({engine for found in several.values() for engine in found})
    return (
        f"The same tokens from {' and '.join(engines)} in {total - differing} of {total} decoded "
        f"utterances, wherever more than one of them ran the same model at the same latency and "
        f"precision."
    )


def _control(rows: Sequence[Row]) -> str:
    """How far either seed is from random initialisation, fp32, mean over tiers and languages."""
    wers: dict[tuple[Any, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    silent = set()
    for row in shipped(rows):
        if has_collapsed(row):
            if row["init"] == "random":
                silent.add(hours_label(row["hours"]))
        elif row["precision"] == FULL:
            wers[row["hours"], row["language"], row["test_set"]][row["init"]].append(row["wer"])
    margins: dict[tuple[float, str], list[float]] = defaultdict(list)
    for (hours, _, _), by_init in wers.items():
        for init in COMPARED:
            if init in by_init and "random" in by_init:
                pair = [sum(by_init[name]) / len(by_init[name]) for name in ("random", init)]
                margins[hours, init].append(pair[0] - pair[1])
    texts = [
        f"{init} by {sum(found) / len(found):+.1f} points at {hours_label(hours)}"
        for (hours, init), found in sorted(margins.items())
    ]
    said = []
    if texts:
        said.append(
            f"Better than random initialisation (fp32, mean over latencies): {', '.join(texts)}."
        )
    if silent:
        said.append(
            f"Random initialisation has not begun to recognise anything at "
            f"{', '.join(sorted(silent))} (WER over 90 %, mostly deletions): no margin is given."
        )
    return " ".join(said)
