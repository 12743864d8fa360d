"""gap.json for people: gap.md and a plot of the gap against the amount of training data."""

import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy

from icetransfer import atomic
from icetransfer.config import hours_label

# Okabe and Ito (2008): told apart by colour-blind readers; markers differ as well
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*"

Row = dict[str, Any]


def latency_order(chunk_ms: int) -> float:
    """Sorts offline last."""
    return math.inf if chunk_ms == -1 else chunk_ms


def tier_label(chunk_ms: int) -> str:
    """Names a latency: "160 ms", or "offline"."""
    return "offline" if chunk_ms == -1 else f"{chunk_ms} ms"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def gap_table(analysis: Row) -> tuple[list[str], list[list[str]]]:
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


def markdown(analysis: Row, plots: dict[str, str]) -> str:
    """The whole of gap.md.

    Args:
        analysis: what gap.json holds.
        plots: test set -> file name of its plot.
    """
    method = analysis["method"]
    resampled = " and ".join(method["resampled"])
    intervals = (
        f"Brackets: {method['confidence_percent']} % intervals from {method['replicates']} "
        f"resamples of {resampled}."
        if resampled
        else "One language and no utterances at hand: no interval can be given."
    )
    if len(method["languages"]) < 8 and "languages" in method["resampled"]:
        intervals += (
            f" Intervals from {len(method['languages'])} languages are too narrow: so few say "
            f"little about other languages."
        )
    parts = [
        "# The gap between an English and a multilingual start",
        f"{method['gap']}: above zero, the multilingual start (ML) is the better one. "
        f"Languages: {', '.join(method['languages'])}. {intervals}",
        markdown_table(*gap_table(analysis)),
        *(f"![gap, {test_set}]({name})" for test_set, name in plots.items()),
        "## Decay with data",
        _decay(analysis["power_law"]),
        "## Latency",
        _latency(analysis["latency"]),
        "## Quantisation",
        _quantisation(analysis["quantisation"]),
        "## Noise",
        noise_text(analysis["noise"]),
    ]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _decay(laws: list[Row]) -> str:
    rows = []
    for law in laws:
        fitted = law["b"] is not None
        bounds = ""
        if law["b_ci_low"] is not None:
            bounds = f" [{law['b_ci_low']:.2f}, {law['b_ci_high']:.2f}]"
        rows.append(
            [
                *(law["test_set"], law["precision"], tier_label(law["chunk_ms"])),
                str(law["n_points"]),
                f"{law['a']:.3g}" if fitted else "",
                f"{law['b']:.2f}{bounds}" if fitted else "",
                f"{law['factor_per_doubling']:.2f}" if fitted else "",
                law["method"],
            ]
        )
    header = ["test set", "precision", "latency", "points", "a", "b", "per doubling", "method"]
    text = "Fitted: gap = a × hours^-b, so a is the gap at one hour.\n\n"
    text += markdown_table(header, rows)
    if all(law["n_points"] < 2 for law in laws):
        text += "\nOne amount of data: whether and how the gap decays cannot be concluded.\n"
    elif all(law["n_points"] < 3 for law in laws):
        text += "\nTwo amounts of data fit any law: that it is a power law cannot be concluded.\n"
    return text


def _latency(rows: list[Row]) -> str:
    if not rows:
        return "One latency: whether the gap depends on it cannot be concluded."
    header = ["test set", "precision", "data", "spread over tiers", "shortest − longest tier"]
    lines = [
        [
            *(r["test_set"], r["precision"], hours_label(r["hours"])),
            *(value(r, "spread", "ci"), value(r, "trend", "trend_ci")),
        ]
        for r in rows
    ]
    return (
        "The spread (largest less smallest gap) stays above zero by noise alone; the difference "
        "between the shortest and the longest tier does not.\n\n" + markdown_table(header, lines)
    )


def _quantisation(rows: list[Row]) -> str:
    if not rows:
        return "One precision: what quantisation costs cannot be concluded."
    header = ["precision", "WER change from fp32", "times smaller", "change ML − change EN", "n"]
    lines = [
        [
            r["precision"],
            value(r, "wer_change", "wer_change_ci"),
            f"{r['size_ratio']:.2f}" if r["size_ratio"] else "",
            value(r, "ml_minus_en", "ml_minus_en_ci"),
            str(r["n"]),
        ]
        for r in rows
    ]
    return markdown_table(header, lines)


def noise_text(rows: list[Row]) -> str:
    """What is known of the noise between training runs."""
    repeated = [row for row in rows if row["gap_sd"] is not None]
    if not repeated:
        return (
            "No cell was repeated with other seeds for both inits: the noise between training runs "
            "is not known and no interval here contains it."
        )
    lines = []
    for row in repeated:
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
    typical = float(numpy.sqrt(numpy.mean([row["gap_sd"] ** 2 for row in repeated])))
    cells = sorted({f"{row['language']} at {hours_label(row['hours'])}" for row in repeated})
    return (
        f"Repeated with other seeds: {', '.join(cells)}. From the seed alone, the gap of one "
        f"language there has a standard deviation of {typical:.2f} points; a mean over n languages "
        f"of one run each, if the others are alike, {typical:.2f}/√n. Standard deviations of "
        f"so few runs are themselves rough.\n\n" + markdown_table(header, lines)
    )


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
        x = numpy.array([r["hours"] * scale * offset for r in of_tier])
        y = numpy.array([r["gap"] for r in of_tier])
        low = numpy.array([r["gap"] if r["ci_low"] is None else r["ci_low"] for r in of_tier])
        high = numpy.array([r["gap"] if r["ci_high"] is None else r["ci_high"] for r in of_tier])
        colour = COLOURS[index % len(COLOURS)]
        axes.errorbar(
            x,
            y,
            yerr=[numpy.maximum(y - low, 0), numpy.maximum(high - y, 0)],
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
    axes.set_xticks(ticks, [f"{tick:g}" for tick in numpy.round(ticks, 3)])
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
            x = numpy.geomspace(hours.min(), hours.max(), 50)
            axes.plot(x * scale, law["a"] * x ** -law["b"], color=colour, linewidth=1)


def write(analysis: Row, out: Path) -> None:
    """Writes gap.json, gap.md and gap-<test set>.png into the folder `out`."""
    plots = {}
    for test_set in sorted({row["test_set"] for row in analysis["mean_gap"]}):
        plots[test_set] = f"gap-{test_set}.png"
        plot(analysis, test_set, out / plots[test_set])
    atomic.write_text(out / "gap.json", json.dumps(analysis, indent=1) + "\n")
    atomic.write_text(out / "gap.md", markdown(analysis, plots))
