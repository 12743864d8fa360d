"""gap.json for people: gap.md and a plot of the gap against the amount of training data."""

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from icetransfer.analysis import laws
from icetransfer.config import hours_label
from icetransfer.stage import atomic
from icetransfer.stage.markdown import markdown_table

# Okabe and Ito (2008): told apart by colour-blind readers; markers differ as well
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*"

Row = dict[str, Any]
TableData = tuple[list[str], list[list[str]]]  # header, rows


def latency_order(chunk_ms: int) -> float:
    """Sorts offline last."""
    return math.inf if chunk_ms == -1 else chunk_ms


def tier_label(chunk_ms: int) -> str:
    """Names a latency: "160 ms", or "offline"."""
    return "offline" if chunk_ms == -1 else f"{chunk_ms} ms"


def gap_table(analysis: Row) -> TableData:
    """Header and rows: a row for each test set, precision and amount of data, a column a tier."""
    found = {
        (r["test_set"], r["precision"], r["hours"], r["chunk_ms"]): r for r in analysis["mean_gap"]
    }
    tiers = sorted({key[3] for key in found}, key=latency_order)
    rows = []
    for test_set, precision, hours in sorted({key[:3] for key in found}):
        cells = [found.get((test_set, precision, hours, tier)) for tier in tiers]
        counts = {cell["n_languages"] for cell in cells if cell}
        rows.append(
            [test_set, precision, hours_label(hours), "/".join(map(str, sorted(counts)))]
            + [value(cell, "gap", "ci") if cell else "" for cell in cells]
        )
    return ["test set", "precision", "data", "languages", *map(tier_label, tiers)], rows


def value(row: Row, name: str, prefix: str) -> str:
    """Writes "+1.23 [-0.10, +2.50]", or the number alone where there is no interval."""
    if row.get(name) is None:
        return ""
    text = f"{row[name]:+.2f}"
    if row[f"{prefix}_low"] is not None:
        text += f" [{row[f'{prefix}_low']:+.2f}, {row[f'{prefix}_high']:+.2f}]"
    return text


def _bare(row: Row, name: str, prefix: str, digits: str = ".2f") -> str:
    """Writes "1.23 [0.10, 2.50]": what has no sign to speak of."""
    if row.get(name) is None:
        return ""
    text = f"{row[name]:{digits}}"
    if row[f"{prefix}_low"] is not None:
        text += f" [{row[f'{prefix}_low']:{digits}}, {row[f'{prefix}_high']:{digits}}]"
    return text


def _probability(value: float | None) -> str:
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


@dataclass(frozen=True)
class Section:
    """A part of a report: a heading, sentences, and perhaps a list and a table under them."""

    title: str
    sentences: tuple[str, ...]
    table: TableData | None = None
    lines: tuple[str, ...] = ()

    def markdown(self) -> str:
        """The section as Markdown."""
        parts = [f"## {self.title}", " ".join(self.sentences)]
        parts.append("\n".join(f"* {line}" for line in self.lines))
        if self.table:
            parts.append(markdown_table(*self.table).rstrip())
        return "\n\n".join(part for part in parts if part)


def intervals_text(analysis: Row) -> str:
    """What the brackets are."""
    method = analysis["method"]
    if not method["resampled"]:
        return "One language and no utterances at hand: no interval can be given."
    units = "/".join(method["clusters"])
    by = f" (utterances by {units})" if units and units != "utterance" else ""
    return (
        f"Brackets: {method['confidence_percent']} % intervals from {method['replicates']} "
        f"resamples of {' and '.join(method['resampled'])}{by}, widened for their small number."
    )


def sections(analysis: Row) -> list[Section]:
    """Everything that is not the table of gaps."""
    return [
        _decay(analysis["power_law"]),
        _laws(analysis["power_law"]),
        _latency(analysis["latency"]),
        _quantisation(analysis["quantisation"]),
        _savings(analysis["hours_saved"]),
        _noise(analysis["noise"]),
        Section("What cannot be concluded", (), lines=tuple(analysis["cannot_conclude"]))
        if analysis["cannot_conclude"]
        else Section("What cannot be concluded", ("Nothing of the above is out of reach.",)),
    ]


def markdown(analysis: Row, plots: dict[str, str]) -> str:
    """The whole of gap.md.

    Args:
        analysis: what gap.json holds.
        plots: test set -> file name of its plot.
    """
    method = analysis["method"]
    parts = [
        "# The gap between an English and a multilingual start",
        f"{method['gap']}: above zero, the multilingual start (ML) is the better one. "
        f"Languages: {', '.join(method['languages'])}. {intervals_text(analysis)}",
        markdown_table(*gap_table(analysis)),
        *(f"![gap, {test_set}]({name})" for test_set, name in plots.items()),
        *(section.markdown() for section in sections(analysis)),
    ]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _decay(rows: list[Row]) -> Section:
    lines = []
    for law in rows:
        fitted = law["b"] is not None
        lines.append(
            [
                *(law["test_set"], law["precision"], tier_label(law["chunk_ms"])),
                str(law["n_points"]),
                _bare(law, "a", "a_ci", ".3g") if fitted else "",
                _bare(law, "b", "b_ci") if fitted else "",
                _bare(law, "factor_per_doubling", "factor_ci") if fitted else "",
                threshold_text(law),
                law["method"].removeprefix(laws.METHOD).removeprefix("; "),
            ]
        )
    header = ["test set", "precision", "latency", "points", "a", "b", "per doubling"]
    header += [f"data for a gap under {rows[0]['threshold']:g}", "note"]
    sentences = [f"Fitted by {laws.METHOD}: gap = a × hours^-b, so a is the gap at one hour."]
    if all(law["n_points"] < 2 for law in rows):
        sentences.append("One amount of data: whether the gap decays cannot be concluded.")
    elif all(law["n_points"] < 3 for law in rows):
        sentences.append("Two amounts of data fit any law: two points cannot test it.")
    return Section("Decay with data", tuple(sentences), (header, lines))


def amount_label(hours: float) -> str:
    """Names a computed amount of data, to two digits: "32min", "1.1h", "1900h"."""
    if hours < 1:
        return f"{float(f'{hours * 60:.2g}'):g}min"
    return f"{float(f'{hours:.2g}'):.0f}h" if hours >= 10 else f"{hours:.2g}h"


def threshold_text(law: Row) -> str:
    """The amount of data at which a gap falls under its threshold."""
    found = law["hours_under_threshold"]
    if found is None:
        return ""
    if found["hours"] == 0:
        return "any"
    text = "none in reach" if found["hours"] is None else amount_label(found["hours"])
    if found["low"] is not None or found["high"] is not None:
        ends = [amount_label(x) if x else "…" for x in (found["low"], found["high"])]
        text += f" [{ends[0]}, {ends[1]}]"
    return text + (" (extrapolated)" if found["extrapolated"] else "")


def _laws(rows: list[Row]) -> Section:
    lines = []
    names = [candidate["law"] for candidate in rows[0]["candidates"]]
    for law in rows:
        if law["n_points"] < 3:
            continue
        cells = [
            " / ".join("–" if c[key] is None else f"{c[key]:.2f}" for key in ("aicc", "loo"))
            for c in law["candidates"]
        ]
        lines.append(
            [
                *(law["test_set"], law["precision"], tier_label(law["chunk_ms"]), *cells),
                *(law["chosen"] or "none", law["choice"]),
            ]
        )
    if not lines:
        sentence = "Fewer than three amounts of data: no law can be held against another."
        return Section("Which law", (sentence,))
    header = ["test set", "precision", "latency", *names, "chosen", "why"]
    sentence = (
        "AICc / root mean square error at amounts left out in turn, in points; lower is better, "
        "and – is too few amounts."
    )
    return Section("Which law", (sentence,), (header, lines))


def _latency(rows: list[Row]) -> Section:
    if not rows:
        sentence = "One latency: whether the gap depends on it cannot be concluded."
        return Section("Latency", (sentence,))
    header = ["test set", "precision", "data", "spread over tiers", "shortest − longest tier"]
    header += ["p, all the same", f"p, {rows[0]['margin']:g} points apart", "the gap"]
    lines = [
        [
            *(r["test_set"], r["precision"], hours_label(r["hours"])),
            *(_bare(r, "spread", "ci"), value(r, "trend", "trend_ci")),
            *(_probability(r["difference_p"]), _probability(r["equivalence_p"]), r["verdict"]),
        ]
        for r in rows
    ]
    sentence = (
        "The spread is the largest less the smallest gap; noise alone keeps it above zero, and its "
        "interval allows for that. A small first p says that latency matters; a small second one "
        f"that no two tiers are {rows[0]['margin']:g} points apart (equivalence test, 5 % level)."
    )
    return Section("Latency", (sentence,), (header, lines))


def _quantisation(rows: list[Row]) -> Section:
    rows = [row for row in rows if "wer_change" in row]
    if not rows:
        sentence = "One precision: what quantisation costs cannot be concluded."
        return Section("Quantisation", (sentence,))
    header = ["precision", "WER change from fp32", "of EN", "of ML", "change ML − change EN", "p"]
    header += ["times smaller", "pairs"]
    lines = [
        [
            r["precision"],
            *(value(r, f"{name}_change", f"{name}_change_ci") for name in ("wer", "en", "ml")),
            value(r, "ml_minus_en", "ml_minus_en_ci"),
            _probability(r.get("ml_minus_en_p")),
            f"{r['size_ratio']:.2f}" if r["size_ratio"] else "",
            str(r["n"]),
        ]
        for r in rows
    ]
    return Section("Quantisation", ("Points of WER; above zero is worse.",), (header, lines))


def savings_text(row: Row) -> str:
    """Says "2.1× [1.8, 2.6]", or what is known where a curve ends."""
    prefix = {"at_least": "> ", "at_most": "≤ ", None: ""}[row["bound"]]
    text = f"{prefix}{row['ratio']:.1f}×"
    ends = row["ratio_ci_low"], row["ratio_ci_high"]
    if any(end is not None for end in ends):
        text += " [" + ", ".join("…" if end is None else f"{end:.1f}" for end in ends) + "]"
    return text


def _savings(rows: list[Row]) -> Section:
    title = "Hours that ML saves"
    if not rows:
        return Section(title, ("One amount of data: no curve to read it from.",))
    tiers = sorted({row["chunk_ms"] for row in rows}, key=latency_order)
    table: dict[tuple[str, str, float], dict[int, str]] = defaultdict(dict)
    for row in rows:
        key = row["test_set"], row["precision"], row["hours"]
        table[key][row["chunk_ms"]] = savings_text(row)
    lines = [
        [key[0], key[1], hours_label(key[2]), *(cells.get(tier, "") for tier in tiers)]
        for key, cells in sorted(table.items())
    ]
    sentence = (
        "How many times ML's data EN needs for the same WER, read from EN's curve between the "
        "amounts measured; > where EN gets there at none of them, ≤ where its smallest is better."
    )
    return Section(
        title, (sentence,), (["test set", "precision", "ML's data", *map(tier_label, tiers)], lines)
    )


def noise_text(rows: list[Row]) -> str:
    """What is known of the noise between training runs."""
    repeated = [row for row in rows if row["gap_sd"] is not None]
    if not repeated:
        return (
            "No cell was repeated with other seeds for both inits: the noise between training runs "
            "is not known, and intervals hold it only as far as it makes languages differ."
        )
    typical = float(np.sqrt(np.mean([row["gap_sd"] ** 2 for row in repeated])))
    cells = sorted({f"{row['language']} at {hours_label(row['hours'])}" for row in repeated})
    return (
        f"Repeated with other seeds: {', '.join(cells)}. From the seed alone, the gap of one "
        f"language there has a standard deviation of {typical:.2f} points; a mean over n languages "
        f"of one run each, if the others are alike, {typical:.2f}/√n. Standard deviations of "
        f"so few runs are themselves rough."
    )


def _noise(rows: list[Row]) -> Section:
    lines = []
    for row in rows:
        if row["gap_sd"] is None:
            continue
        gaps = ", ".join(f"{gap:+.2f}" for gap in row["gaps"])
        spreads = ", ".join(f"{init} {sd:.2f}" for init, sd in sorted(row["wer_sd"].items()))
        lines.append(
            [
                *(row["language"], row["test_set"], row["precision"], hours_label(row["hours"])),
                *(tier_label(row["chunk_ms"]), gaps, f"{row['gap_sd']:.2f}", spreads),
            ]
        )
    header = ["language", "test set", "precision", "data", "latency"]
    header += ["gap of each seed", "its SD", "SD of WER"]
    return Section("Noise", (noise_text(rows),), (header, lines) if lines else None)


def plot(analysis: Row, test_set: str, path: Path) -> None:
    """The gap against the amount of data, a line for each latency, with the fitted laws."""
    rows = [r for r in analysis["mean_gap"] if r["test_set"] == test_set]
    precisions = {r["precision"] for r in rows}
    precision = "fp32" if "fp32" in precisions else sorted(precisions)[0]
    rows = [r for r in rows if r["precision"] == precision]
    in_minutes = max(r["hours"] for r in rows) < 2
    scale, unit = (60, "minutes") if in_minutes else (1, "hours")
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    tiers = sorted({r["chunk_ms"] for r in rows}, key=latency_order)
    for index, tier in enumerate(tiers):
        of_tier = sorted((r for r in rows if r["chunk_ms"] == tier), key=lambda r: r["hours"])
        # tiers side by side, or their bars would hide one another
        offset = 1.03 ** (index - (len(tiers) - 1) / 2)
        x = np.array([r["hours"] * scale * offset for r in of_tier])
        y = np.array([r["gap"] for r in of_tier])
        low = np.array([r["gap"] if r["ci_low"] is None else r["ci_low"] for r in of_tier])
        high = np.array([r["gap"] if r["ci_high"] is None else r["ci_high"] for r in of_tier])
        colour = COLOURS[index % len(COLOURS)]
        axes.errorbar(
            x,
            y,
            yerr=[np.maximum(y - low, 0), np.maximum(high - y, 0)],
            color=colour,
            marker=MARKERS[index % len(MARKERS)],
            linestyle="none",
            capsize=3,
            label=tier_label(tier),
        )
        _plot_law(axes, analysis, (test_set, precision, tier), x / scale, scale, colour)
    axes.axhline(0, color="0.4", linewidth=0.8)
    axes.set_xscale("log")
    ticks = sorted({r["hours"] * scale for r in rows})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in np.round(ticks, 3)])
    axes.minorticks_off()
    axes.set_xlabel(f"training data, {unit}")
    axes.set_ylabel("WER(EN) − WER(ML), points")
    axes.set_title(f"{test_set}, {precision}: above zero the multilingual start is better")
    axes.legend(title="latency")
    with atomic.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)


def _plot_law(
    axes: Any, analysis: Row, series: tuple[str, str, int], hours: Any, scale: int, colour: str
) -> None:
    for law in analysis["power_law"]:
        if (law["test_set"], law["precision"], law["chunk_ms"]) == series and law["b"] is not None:
            x = np.geomspace(hours.min(), hours.max(), 50)
            axes.plot(x * scale, law["a"] * x ** -law["b"], color=colour, linewidth=1)


def write(analysis: Row, out: Path) -> None:
    """Writes gap.json, gap.md and gap-<test set>.png into the folder `out`."""
    plots = {}
    for test_set in sorted({row["test_set"] for row in analysis["mean_gap"]}):
        plots[test_set] = f"gap-{test_set}.png"
        plot(analysis, test_set, out / plots[test_set])
    atomic.write_text(out / "gap.json", json.dumps(analysis, indent=1) + "\n")
    atomic.write_text(out / "gap.md", markdown(analysis, plots))
