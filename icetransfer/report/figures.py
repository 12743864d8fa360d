"""Figures of a sweep's report as SVG text that follows the page's light or dark colours.

Every figure is one panel, small enough to be read on a phone; pages put several side by side.  A
colour stands in the SVG as a CSS variable with a default, so that a page may choose another for a
dark background; a file of its own carries a style sheet that does the same.
"""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from icetransfer.analysis import study
from icetransfer.analysis.gap_report import COLOURS, MARKERS, latency_order, tier_label
from icetransfer.analysis.verdict import language_name

Row = dict[str, Any]

INIT_COLOURS = {"en": COLOURS[1], "ml": COLOURS[0], "random": COLOURS[3]}
INIT_MARKERS = {"en": "o", "ml": "s", "random": "^"}
SIZE = (4.6, 3.6)  # inches: 440 CSS pixels wide
INK, GRID = "#010203", "#010204"  # replaced by the page's own
# lighter variants of the series' colours, for a dark background
DARK = dict(
    zip(
        COLOURS,
        ("#4da3e0", "#ff8a3d", "#2fc99a", "#e39cc4", "#f0b53a", "#7cc8f2", "#dddddd"),
        strict=True,
    )
)
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "icetransfer",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.titlesize": 11,
    "legend.fontsize": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def colour_rules(dark: bool) -> str:
    """CSS declarations of the figures' colours."""
    values = {"ink": "#e4e4e4" if dark else "#222222", "grid": "#444444" if dark else "#dddddd"}
    values |= {
        f"series-{index}": DARK[colour] if dark else colour for index, colour in enumerate(COLOURS)
    }
    return " ".join(f"--{name}: {value};" for name, value in values.items())


class Figure:
    """One panel, drawn in a `with` block; `svg` is its text afterwards."""

    def __init__(self, title: str, legend: str | None = None) -> None:
        self.svg = ""
        self._context = matplotlib.rc_context(STYLE)
        self._title, self._legend = title, legend

    def __enter__(self) -> Any:
        self._context.__enter__()
        self._figure, self._axes = plt.subplots(figsize=SIZE, layout="constrained")
        self._axes.set_title(self._title, loc="left")
        return self._axes

    def __exit__(self, *error: object) -> None:
        text = io.StringIO()
        if error[0] is None:
            handles, labels = self._axes.get_legend_handles_labels()
            # under the axes, where it hides nothing
            self._figure.legend(
                handles, labels, title=self._legend, loc="outside lower center", ncols=3
            )
            self._figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
            self.svg = _themed(text.getvalue())
        plt.close(self._figure)
        self._context.__exit__(None, None, None)


def _themed(svg: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    variables = {INK: "var(--ink, #222222)", GRID: "var(--grid, #dddddd)"}
    variables |= {
        colour: f"var(--series-{index}, {colour})" for index, colour in enumerate(COLOURS)
    }
    for colour, variable in variables.items():
        svg = re.sub(colour, variable, svg, flags=re.IGNORECASE)
    # text without a colour of its own is black, whatever the page
    svg = svg.replace('<text style="', '<text style="fill: var(--ink, #222222); ')
    return re.sub(r"[ \t]+\n", "\n", svg).strip()


def inline(svg: str, number: int) -> str:
    """The SVG for a page with others: no two ids are the same, and width follows the page."""
    svg = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>f{number}-", svg)
    return re.sub(r'<svg ([^>]*?)height="[^"]*" ', r"<svg \1", svg, count=1)


def standalone(svg: str) -> str:
    """The SVG as a file that follows the reader's light or dark colours."""
    style = (
        f"<style>svg {{ {colour_rules(dark=False)} }} @media (prefers-color-scheme: dark) "
        f"{{ svg {{ {colour_rules(dark=True)} }} }}</style>"
    )
    return '<?xml version="1.0" encoding="utf-8"?>\n' + svg.replace(">", f">{style}", 1) + "\n"


def _hours_axis(axes: Any, amounts: Sequence[float]) -> float:
    """Labels a log axis of training data in minutes or hours, and gives the unit in hours^-1."""
    scale, unit = (60.0, "minutes") if max(amounts) < 2 else (1.0, "hours")
    ticks = sorted({amount * scale for amount in amounts})
    axes.set_xscale("log")
    # no room for amounts that nearly touch
    shown = [
        tick for index, tick in enumerate(ticks) if not index or tick > 1.25 * ticks[index - 1]
    ]
    axes.set_xticks(shown, [f"{tick:.4g}" for tick in shown])
    axes.minorticks_off()
    axes.set_xlabel(f"training data, {unit}")
    return scale


def _bars(rows: Sequence[Row], name: str, low: str, high: str) -> tuple[Any, Any]:
    """Values, and the lengths of their bars below and above, (2, rows)."""
    values = np.array([row[name] for row in rows])
    ends = [[r[name] if r[end] is None else r[end] for r in rows] for end in (low, high)]
    return values, np.maximum(np.abs(np.array(ends) - values), 0)


def gap_by_hours(rows: Sequence[Row], languages: Sequence[Row], law: Row | None, title: str) -> str:
    """The mean gap of one latency against data, with the law and its band.

    Args:
        rows: of `mean_gap`, one test set, precision and latency.
        languages: of `language_gap`, the same.
        law: of `power_law`, or None.
        title: of the panel.
    """
    rows = sorted(rows, key=lambda row: row["hours"])
    figure = Figure(title)
    with figure as axes:
        scale = _hours_axis(axes, [row["hours"] for row in rows])
        if law and law["band"]:
            x = [row["hours"] * scale for row in law["band"]]
            if law["band"][0]["ci_low"] is not None:
                low, high = ([row[end] for row in law["band"]] for end in ("ci_low", "ci_high"))
                axes.fill_between(x, low, high, color=COLOURS[0], alpha=0.18, linewidth=0)
            label = f"a × hours^−{law['b']:.2f}"
            axes.plot(x, [row["gap"] for row in law["band"]], color=COLOURS[0], label=label)
        axes.plot(
            [row["hours"] * scale for row in languages],
            [row["gap"] for row in languages],
            *("x",),
            color=COLOURS[4],
            markersize=5,
            label="a language",
        )
        values, bars = _bars(rows, "gap", "ci_low", "ci_high")
        x = [row["hours"] * scale for row in rows]
        axes.errorbar(x, values, bars, fmt="o", color=COLOURS[1], capsize=3, label="mean, 95 %")
        # bands and bars of few languages may be endless: what was measured sets the scale
        shown = [row["gap"] for row in [*rows, *languages]] + [0.0]
        room = 0.6 * (max(shown) - min(shown)) + 0.5
        axes.set_ylim(min(shown) - room, max(shown) + room)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_ylabel("WER(EN) − WER(ML), points")
    return figure.svg


def gap_by_language(rows: Sequence[Row], title: str) -> str:
    """Each language's gap against data, with its band, and its name at the end of its line.

    Args:
        rows: of `verdict`, one test set.
        title: of the panel.
    """
    languages = sorted({row["language"] for row in rows})
    figure = Figure(title)
    with figure as axes:
        scale = _hours_axis(axes, [row["hours"] for row in rows])
        for index, language in enumerate(languages):
            own = sorted((r for r in rows if r["language"] == language), key=lambda r: r["hours"])
            x = np.array([row["hours"] for row in own]) * scale
            # side by side, or their bars would hide one another
            x = x * 1.025 ** (index - (len(languages) - 1) / 2)
            values, bars = _bars(own, "gap", "ci_low", "ci_high")
            colour = COLOURS[index % len(COLOURS)]
            # as many languages as colours, and then again with other lines
            line = ("-", "--", ":")[index // len(COLOURS) % 3]
            axes.fill_between(
                x, values - bars[0], values + bars[1], color=colour, alpha=0.1, linewidth=0
            )
            marker = MARKERS[index % len(MARKERS)]
            name = language_name(language)
            axes.plot(x, values, line, color=colour, marker=marker, markersize=4, label=name)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_ylabel("points: above zero ML is better")
    return figure.svg


def wer_by_hours(series: dict[str, list[Row]], title: str) -> str:
    """WER against data, a line for each init.

    Args:
        series: init -> rows with hours, wer, low and high (None where not known).
        title: of the panel.
    """
    figure = Figure(title)
    with figure as axes:
        scale = _hours_axis(axes, [row["hours"] for rows in series.values() for row in rows])
        for index, (init, rows) in enumerate(series.items()):
            rows = sorted(rows, key=lambda row: row["hours"])
            values, bars = _bars(rows, "wer", "low", "high")
            # side by side, or their bars would hide one another
            x = [row["hours"] * scale * 1.04 ** (index - 0.5) for row in rows]
            axes.errorbar(
                x,
                values,
                bars,
                marker=INIT_MARKERS[init],
                color=INIT_COLOURS[init],
                capsize=3,
                label=init.upper() if init != "random" else init,
            )
        axes.set_ylim(bottom=0)
        axes.set_ylabel("WER, %")
    return figure.svg


def gap_by_tier(rows: Sequence[Row], labels: dict[float, str], title: str) -> str:
    """The gap against latency, a line for each amount of data.

    Args:
        rows: of `mean_gap`, one test set and precision.
        labels: of the amounts of data.
        title: of the panel.
    """
    tiers = sorted({row["chunk_ms"] for row in rows}, key=latency_order)
    figure = Figure(title, "training data")
    with figure as axes:
        for index, (hours, label) in enumerate(sorted(labels.items())):
            of_hours = sorted(
                (row for row in rows if row["hours"] == hours),
                key=lambda row: latency_order(row["chunk_ms"]),
            )
            values, bars = _bars(of_hours, "gap", "ci_low", "ci_high")
            shift = 0.08 * (index - (len(labels) - 1) / 2)
            axes.errorbar(
                [tiers.index(row["chunk_ms"]) + shift for row in of_hours],
                values,
                bars,
                marker=MARKERS[index % len(MARKERS)],
                color=COLOURS[index % len(COLOURS)],
                capsize=3,
                label=label,
            )
        axes.set_xticks(range(len(tiers)), [tier_label(tier).replace(" ms", "") for tier in tiers])
        axes.set_xlabel("latency: chunk, ms")
        axes.set_ylabel("WER(EN) − WER(ML), points")
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.margins(x=0.12)
    return figure.svg


def change_by_tier(rows: Sequence[Row], title: str) -> str:
    """The change of WER by quantisation against latency, a line for each precision.

    Args:
        rows: of `quantisation`.
        title: of the panel.
    """
    tiers = sorted({c["chunk_ms"] for row in rows for c in row["by_chunk_ms"]}, key=latency_order)
    figure = Figure(title)
    with figure as axes:
        for index, row in enumerate(rows):
            changes = row["by_chunk_ms"]
            values, bars = _bars(changes, "wer_change", "wer_change_ci_low", "wer_change_ci_high")
            shift = 0.1 * (index - (len(rows) - 1) / 2)
            axes.errorbar(
                [tiers.index(change["chunk_ms"]) + shift for change in changes],
                values,
                bars,
                marker=MARKERS[index % len(MARKERS)],
                color=COLOURS[index % len(COLOURS)],
                capsize=3,
                label=row["precision"],
            )
        axes.set_xticks(range(len(tiers)), [tier_label(tier).replace(" ms", "") for tier in tiers])
        axes.set_xlabel("latency: chunk, ms")
        axes.set_ylabel("change of WER, points")
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.margins(x=0.12)
    return figure.svg


def beside_published(rows: Sequence[Row], title: str) -> str:
    """Our mean gaps and the two published ones over the hours of both.

    Args:
        rows: of `mean_gap`, one test set, precision and latency.
        title: of the panel.
    """
    hours, gaps = zip(*study.POINTS, strict=True)
    law = study.law()
    figure = Figure(title)
    with figure as axes:
        rows = sorted(rows, key=lambda row: row["hours"])
        values, bars = _bars(rows, "gap", "ci_low", "ci_high")
        axes.errorbar(
            [row["hours"] for row in rows],
            values,
            bars,
            fmt="o-",
            color=COLOURS[1],
            capsize=3,
            label="ours, 95 %",
        )
        x = np.geomspace(min(hours), max(hours), 50)
        axes.plot(x, [law.gap(amount) for amount in x], "--", color=COLOURS[2], linewidth=1)
        axes.plot(hours, gaps, "D", color=COLOURS[2], label="published elsewhere")
        axes.set_xscale("log")
        axes.axhline(0, color=INK, linewidth=0.8)
        shown = [*(values - bars[0]), *(values + bars[1]), *gaps, 0.0]
        room = 0.1 * (max(shown) - min(shown))
        axes.set_ylim(min(shown) - room, max(shown) + room)
        axes.set_xlabel("training data, hours")
        axes.set_ylabel("WER(EN) − WER(ML), points")
    return figure.svg
