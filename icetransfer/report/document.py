"""What a sweep's report says and in which order, from report.json alone.

The answer comes first; then what is missing, the gap and all about it, every WER, the cost, and
where all of it comes from.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from icetransfer import gap
from icetransfer.analysis import gap_report, study, verdict
from icetransfer.analysis.collapse import has_collapsed
from icetransfer.analysis.gap_report import (
    latency_order,
    savings_text,
    threshold_text,
    tier_label,
    value,
)
from icetransfer.analysis.significance import LEVEL
from icetransfer.analysis.sweep_results import FULL
from icetransfer.config import hours_label
from icetransfer.recommend import MINI_HOURS
from icetransfer.report import figures
from icetransfer.report.page import (
    Answer,
    Bullets,
    Code,
    Document,
    Drawing,
    Gallery,
    Heading,
    Part,
    TablePart,
    Text,
)
from icetransfer.report.tables import (
    COLLAPSED,
    INITS,
    TIE,
    condition_table,
    cost_table,
    error_tables,
    latency_table,
    mean,
    shipped,
    size_table,
)

Row = dict[str, Any]

LATENCY_NOTE = (
    "From a word's end in the audio until the audio is there that its last token needs; computing "
    "comes on top. Model: from the word's end to its last token; chunk: from the token to the end "
    "of its chunk; then the look-ahead and a feature frame. Words that were recognised, their ends "
    "by a forced alignment with the model's CTC head."
)


#: Of a report without verdicts for each language.
NAMED_BY_THE_MEAN = (
    " A start is named where a gap of the other sign is ruled out at the 5 % level, one-sided, and "
    f"the gap is at least {gap.NEGLIGIBLE:g}."
)
CONDITION_NOTE = (
    "WER in percent, means over languages, test sets and seeds, at one latency. Each condition "
    "changes the same test recordings; docs/robustness.md says how."
)


def document(tree: Row, folder: str) -> Document:
    """The report.

    Args:
        tree: what report.json holds.
        folder: where the data lie, relative to the page: "" or ending in a slash.
    """
    analysis = tree["gap"]
    parts: list[Part] = [answer(analysis) if analysis else Answer(tree["remarks"][-1], [])]
    for heading, found in (("Failed", tree["failures"]), ("Missing", tree["missing"])):
        if found:
            parts += [Heading(heading), Bullets(found)]
    if analysis:
        parts += _verdict_parts(_verdicts(analysis))
        parts += _gap_parts(analysis)
        parts += [Heading("WER of each language"), Gallery(_language_drawings(tree["results"]))]
        parts += _published_parts(analysis)
    for title, table in error_tables(tree["results"], analysis, bold=True).items():
        parts += [Heading(title), TablePart(*table)]
    parts.append(
        Text(
            f"**Bold**: the lowest WER of a language, amount of data and latency; {TIE}: EN and ML "
            f"cannot be told apart (the 95 % interval of their difference on the same utterances "
            f"holds zero); ±: half of the 95 % interval of a WER"
            + (
                f"; {COLLAPSED}: the model says next to nothing (WER over 90 %, mostly deletions) "
                f"and stands in no mean."
                if any(map(has_collapsed, tree["results"]))
                else "."
            )
        )
    )
    header, lines = condition_table(tree.get("conditions", []))  # earlier reports had none
    if lines:
        parts += [Heading("As if recorded elsewhere"), TablePart(header, lines)]
        parts.append(Text(CONDITION_NOTE))
    parts += [Heading("Size and speed"), TablePart(*size_table(tree["results"]))]
    parts.append(Text("RTF: seconds of computing per second of audio, on one thread of a CPU."))
    header, lines = latency_table(tree["results"])
    if lines:
        parts += [Heading("Latency of a word"), TablePart(header, lines), Text(LATENCY_NOTE)]
        parts.append(Gallery(_latency_drawings(tree["results"])))
    if tree["costs"]:
        parts += [Heading("Cost of each cell"), TablePart(*cost_table(tree["costs"]))]
    parts += [Heading("Remarks"), Bullets(tree["remarks"])]
    parts += _origin_parts(tree, folder)
    return Document(f"Sweep {tree['sweep']}: an English or a multilingual start?", parts)


def _latency_drawings(results: Sequence[Row]) -> list[Drawing]:
    """WER against the latency that users see, a figure for each test set, fp32."""
    groups: dict[str, dict[tuple[float, int], list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in shipped(results):
        if row["precision"] == FULL and row.get("latency_ms_median") is not None:
            key = (row.get("delay_penalty", 0.0), row["chunk_ms"])
            groups[row["test_set"]][key].append(row)
    drawings = []
    for test_set, points in sorted(groups.items()):
        series: dict[float, list[Row]] = defaultdict(list)
        for (penalty, tier), rows in points.items():
            means = {key: mean(rows, key) for key in ("latency_ms_median", "wer")}
            series[penalty].append({"chunk_ms": tier, **means})
        svg = figures.wer_by_latency(series, test_set)
        caption = f"WER against the latency that a user sees, mean over cells, {test_set}"
        drawings.append(Drawing(_file("latency", test_set), svg, caption))
    return drawings


def _headline(analysis: Row) -> list[Row]:
    """The mean gaps that the answer speaks of: fp32, first test set, shortest latency."""
    rows = analysis["mean_gap"]
    precision = _precision(analysis)
    rows = [row for row in rows if row["precision"] == precision]
    first = min((row["test_set"], latency_order(row["chunk_ms"])) for row in rows)
    rows = [r for r in rows if (r["test_set"], latency_order(r["chunk_ms"])) == first]
    return sorted(rows, key=lambda row: row["hours"])


def _precision(analysis: Row) -> str:
    found = sorted({row["precision"] for row in analysis["mean_gap"]})
    return FULL if FULL in found else found[0]


def _same_series(rows: Sequence[Row], row: Row) -> list[Row]:
    keys = ("test_set", "precision", "chunk_ms")
    return [other for other in rows if all(other[key] == row[key] for key in keys)]


def answer(analysis: Row) -> Answer:
    """The answer in a sentence, and what it rests on."""
    rows = _headline(analysis)
    verdicts = _verdicts(analysis)
    choices = defaultdict(list)
    for row in rows:
        choices[_choice_text(row)].append(hours_label(row["hours"]))
    said = "; ".join(f"**{choice}** at {', '.join(at)}" for choice, at in choices.items())
    first = rows[0]
    gaps = ", ".join(f"{hours_label(row['hours'])} {value(row, 'gap', 'ci')}" for row in rows)
    where = f"{first['test_set']}, {first['precision']}, {tier_label(first['chunk_ms'])}"
    count = max(row["n_languages"] for row in rows)
    languages = "one language" if count == 1 else f"mean of {count} languages"
    texts = [
        *([_verdict_text(analysis, verdicts)] if verdicts else []),
        f"Gap, WER(EN) − WER(ML) in points ({where}, {languages}): {gaps}. "
        f"{gap_report.intervals_text(analysis)}{'' if verdicts else NAMED_BY_THE_MEAN}",
        _decay_text(analysis, first),
        _latency_text(analysis, first),
        _quantisation_text(analysis),
        _savings_text(analysis, first),
    ]
    if max(row["hours"] for row in rows) < MINI_HOURS:
        texts.append(
            f"This is a miniature, of at most {hours_label(rows[-1]['hours'])} of training data: "
            f"it shows the path and the trend, not the figures of real amounts of data."
        )
    headline = f"**{verdict.sentence(verdicts)}**" if verdicts else f"{said}."
    return Answer(headline, [text for text in texts if text])


def _verdicts(analysis: Row) -> list[Row]:
    """Each language's verdict on the test set that the answer speaks of."""
    found = analysis.get("verdict", [])  # earlier reports had none
    return [row for row in found if row["test_set"] == _headline(analysis)[0]["test_set"]]


def _verdict_text(analysis: Row, verdicts: Sequence[Row]) -> str:
    """What the headline rests on: the mean, what another language may bring, latency, precision."""
    test_set = verdicts[0]["test_set"]
    (model,) = (row for row in analysis["hierarchy"] if row["test_set"] == test_set)
    margins = sorted(row["margin"] for row in verdicts)
    text = (
        f"A start is named for a language where it is better by more than the margin with a "
        f"probability of {100 * verdict.SURE:.0f} %; the margin, {margins[0]:.1f} to "
        f"{margins[-1]:.1f} points here, is a twentieth of the WER and at least "
        f"{verdict.MARGIN:g}. On {test_set}, over all latencies"
    )
    means = [f"{value(row, 'gap', 'ci')} at {hours_label(row['hours'])}" for row in model["mean"]]
    text += f", the mean over languages is {', '.join(means)}"
    if "another" in model["mean"][0]:
        ends = [model["mean"][0], model["mean"][-1]]
        expected = [
            f"{value(row, 'another', 'another_ci')} at {hours_label(row['hours'])}" for row in ends
        ]
        text += f"; for one more language like these expect {' and '.join(expected)}"
    if "change_per_doubling" in model:
        change = value(model, "change_per_doubling", "change_per_doubling_ci")
        text += f". Each doubling of the data moves the mean by {change}"
    return text + "."


def _choice_text(row: Row) -> str:
    if row["start"] != "either":
        return f"Start from {row['start']}"
    if abs(row["gap"]) < gap.NEGLIGIBLE:
        return "Either start will do"
    return "Which start is better cannot be told"


def _decay_text(analysis: Row, first: Row) -> str:
    (law,) = _same_series(analysis["power_law"], first)
    if law["b"] is None:
        return f"No law of decay: {law['method']}."
    text = f"Each doubling of the data leaves {law['factor_per_doubling']:.2f} of the gap"
    if law["factor_ci_low"] is not None:
        text += f" [{law['factor_ci_low']:.2f}, {law['factor_ci_high']:.2f}]"
    if (law["hours_under_threshold"] or {}).get("hours"):
        text += f"; it is under {law['threshold']:g} points from {threshold_text(law)} on"
    if law["n_points"] == 2:
        return text + " (two amounts of data fix a law and cannot test it)."
    if law["chosen"] is None:
        return text + f", if it is a power law: {law['choice']}."
    return text + f" (a power law; of the laws compared, {law['chosen']} is chosen)."


def _latency_text(analysis: Row, first: Row) -> str:
    verdicts = defaultdict(list)
    for row in analysis["latency"]:
        if (row["test_set"], row["precision"]) == (first["test_set"], first["precision"]):
            verdicts[row["verdict"]].append(hours_label(row["hours"]))
    if not verdicts:
        return ""
    said = "; ".join(f"{verdict} at {', '.join(at)}" for verdict, at in verdicts.items())
    return f"Whether the gap is the same at every latency: {said}."


def _quantisation_text(analysis: Row) -> str:
    texts = []
    for row in analysis["quantisation"]:
        if "wer_change" not in row:
            continue
        text = f"{row['precision']} changes WER by {value(row, 'wer_change', 'wer_change_ci')}"
        if row["size_ratio"]:
            text += f" at a {row['size_ratio']:.1f} times smaller size"
        if row.get("ml_minus_en_p") is not None:
            depends = row["ml_minus_en_p"] < LEVEL
            text += ", not alike for EN and ML" if depends else ", with no difference seen by init"
        texts.append(text)
    return "; ".join(texts) + "." if texts else ""


def _savings_text(analysis: Row, first: Row) -> str:
    found = [
        f"{savings_text(row)} of {hours_label(row['hours'])}"
        for row in _same_series(analysis["hours_saved"], first)
    ]
    return f"For the WER that ML has, EN needs {', '.join(found)}." if found else ""


def _verdict_parts(verdicts: Sequence[Row]) -> list[Part]:
    """Each language's gap: a picture with a named line for each, and a table."""
    if not verdicts:
        return []
    test_set = verdicts[0]["test_set"]
    svg = figures.gap_by_language(verdicts, f"WER(EN) − WER(ML), {test_set}")
    caption = (
        f"Each language's gap against training data, {test_set}, mean over latencies, fp32: the "
        f"hierarchical model's mean and 95 % interval; above zero ML is better"
    )
    lines = [
        [
            *(verdict.language_name(row["language"]), hours_label(row["hours"])),
            *(value(row, "gap", "ci"), f"{row['margin']:.1f}"),
            *(f"{100 * row[f'probability_{name}']:.0f} %" for name in ("ml", "en", "tie")),
            "not decided" if row["start"] == verdict.OPEN else row["start"],
        ]
        for row in sorted(verdicts, key=lambda row: (row["language"], row["hours"]))
    ]
    header = ["language", "data", "gap", "margin", "ML better", "EN better", "tie", "verdict"]
    return [
        Heading("Each language"),
        Gallery([Drawing(_file("languages", test_set), svg, caption)]),
        TablePart(header, lines),
    ]


def _gap_parts(analysis: Row) -> list[Part]:
    precision = _precision(analysis)
    rows = [row for row in analysis["mean_gap"] if row["precision"] == precision]
    series = {(row["test_set"], row["chunk_ms"]): row for row in rows}
    ordered = sorted(series, key=lambda key: (key[0], latency_order(key[1])))
    drawings = [_gap_drawing(analysis, series[key]) for key in ordered]
    parts: list[Part] = [
        Heading("Gap against training data"),
        Gallery(drawings),
        TablePart(*gap_report.gap_table(analysis)),
    ]
    extra = {
        "Latency": _tier_drawings(analysis, rows),
        "Quantisation": _precision_drawings(analysis),
        "Hours that ML saves": _curve_drawings(analysis, precision),
    }
    for section in gap_report.sections(analysis):
        parts.append(Heading(section.title))
        if section.sentences:
            parts.append(Text(" ".join(section.sentences)))
        if extra.get(section.title):
            parts.append(Gallery(extra[section.title]))
        if section.lines:
            parts.append(Bullets(section.lines))
        if section.table:
            parts.append(TablePart(*section.table))
    return parts


def _file(*names: object) -> str:
    return "-".join(str(name) for name in names).replace("--1", "-offline")


def _gap_drawing(analysis: Row, row: Row) -> Drawing:
    title = f"{row['test_set']}, {tier_label(row['chunk_ms'])}, {row['precision']}"
    laws = _same_series(analysis["power_law"], row)
    svg = figures.gap_by_hours(
        _same_series(analysis["mean_gap"], row),
        _same_series(analysis["language_gap"], row),
        laws[0] if laws else None,
        title,
    )
    caption = f"Gap against training data, {title}; above zero ML is better"
    return Drawing(_file("gap", row["test_set"], row["chunk_ms"]), svg, caption)


def _tier_drawings(analysis: Row, rows: Sequence[Row]) -> list[Drawing]:
    if not analysis["latency"]:
        return []
    drawings = []
    for test_set in sorted({row["test_set"] for row in rows}):
        own = [row for row in rows if row["test_set"] == test_set]
        labels = {row["hours"]: hours_label(row["hours"]) for row in own}
        svg = figures.gap_by_tier(own, labels, f"{test_set}, {own[0]['precision']}")
        caption = f"Gap against latency, {test_set}: level lines are a gap that is always the same"
        drawings.append(Drawing(_file("tiers", test_set), svg, caption))
    return drawings


def _precision_drawings(analysis: Row) -> list[Drawing]:
    rows = [row for row in analysis["quantisation"] if "wer_change" in row]
    if not rows:
        return []
    svg = figures.change_by_tier(rows, f"change from {FULL}")
    caption = "Change of WER by quantisation, mean over languages, inits, data and test sets"
    return [Drawing("precisions", svg, caption)]


def _curve_drawings(analysis: Row, precision: str) -> list[Drawing]:
    groups: dict[tuple[str, int], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in analysis["wer_curve"]:
        if row["precision"] == precision:
            named = row | {"low": row["wer_ci_low"], "high": row["wer_ci_high"]}
            groups[row["test_set"], row["chunk_ms"]][row["init"]].append(named)
    drawings = []
    for test_set, tier in sorted(groups, key=lambda key: (key[0], latency_order(key[1]))):
        title = f"{test_set}, {tier_label(tier)}"
        svg = figures.wer_by_hours(groups[test_set, tier], title)
        caption = f"WER against training data, mean over languages, {title}"
        drawings.append(Drawing(_file("curve", test_set, tier), svg, caption))
    return drawings


def _language_drawings(results: Sequence[Row]) -> list[Drawing]:
    """WER against data of every language at the shortest latency, fp32."""
    rows = [row for row in shipped(results) if row["precision"] == FULL]
    tier = min((row["chunk_ms"] for row in rows), key=latency_order, default=0)
    drawings = []
    names = sorted({(row["language"], row["test_set"]) for row in rows})
    for language, test_set in names:
        series: dict[str, list[Row]] = {}
        for init in INITS:
            found = defaultdict(list)
            for row in rows:
                key = (row["language"], row["test_set"], row["chunk_ms"], row["init"])
                if key == (language, test_set, tier, init):
                    found[row["hours"]].append(row)
            if found:
                series[init] = [_mean_point(hours, own) for hours, own in sorted(found.items())]
        if series:
            title = f"{language}, {test_set}, {tier_label(tier)}"
            svg = figures.wer_by_hours(series, title)
            caption = f"WER against training data, {title}"
            drawings.append(Drawing(_file("language", language, test_set), svg, caption))
    return drawings


def _mean_point(hours: float, repeats: Sequence[Row]) -> Row:
    known = all(row.get("wer_ci_low") is not None for row in repeats)
    return {
        "hours": hours,
        "wer": mean(repeats, "wer"),
        "low": mean(repeats, "wer_ci_low") if known else None,
        "high": mean(repeats, "wer_ci_high") if known else None,
    }


def _published_parts(analysis: Row) -> list[Part]:
    first = _headline(analysis)[0]
    rows = _same_series(analysis["mean_gap"], first)
    (law,) = _same_series(analysis["power_law"], first)
    where = f"{first['test_set']}, {tier_label(first['chunk_ms'])}"
    svg = figures.beside_published(rows, f"ours: {where}")
    caption = f"Our gaps ({where}) beside the two of {study.CITATION}, published elsewhere"
    theirs, quantised = study.law(), []
    for row in analysis["quantisation"]:
        if "wer_change" in row:
            ratio = f", {row['size_ratio']:.1f} times smaller" if row["size_ratio"] else ""
            change = value(row, "wer_change", "wer_change_ci")
            quantised.append(f"{row['precision']}: {change} points{ratio}")
    pairs = [f"{hours_label(hours)} {points:+.2f}" for hours, points in study.POINTS]
    table = [
        [
            "gap, points",
            ", ".join(pairs),
            ", ".join(f"{hours_label(r['hours'])} {value(r, 'gap', 'ci')}" for r in rows),
        ],
        [
            "exponent b",
            f"{theirs.b:.2f} (two points)",
            "none: " + law["method"] if law["b"] is None else f"{law['b']:.2f}",
        ],
        [
            "per doubling",
            f"{theirs.factor_per_doubling:.2f}",
            "" if law["b"] is None else f"{law['factor_per_doubling']:.2f}",
        ],
        ["over latencies", study.LATENCY, _latency_text(analysis, first)],
        ["quantisation", study.FOUR_BIT, "; ".join(quantised)],
    ]
    return [
        Heading("Beside the published trend"),
        Text(
            f"Published elsewhere, on another architecture and other data, and not a result of "
            f"this sweep ({study.SETTING}). {study.statement()}"
        ),
        Gallery([Drawing("published", svg, caption)]),
        TablePart(["", f"published elsewhere ({study.CITATION})", f"ours ({where})"], table),
    ]


def _origin_parts(tree: Row, folder: str) -> list[Part]:
    origin = tree["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    dirty = " with changes" if origin["git_dirty"] else ""
    names = ["results.csv", "report.json"] + (["gap.json"] if tree["gap"] else [])
    return [
        Heading("Data"),
        Text(", ".join(f"[{name}]({folder}{name})" for name in names) + "."),
        Heading("Provenance"),
        Text(
            f"Commit {origin['git_commit']}{dirty}; {origin['time']}; {origin['host']}, "
            f"{origin['cpus']} CPUs, {origin['platform']}; {versions}. The config, provenance and "
            f"checksums of each cell lie in its experiment folder."
        ),
        Code(
            f"./run_all.sh --preset {tree['sweep']}\n"
            f"python -m icetransfer.report --results results/{tree['sweep']}\n"
            f"python -m icetransfer.gap --results results/{tree['sweep']}/results.csv --out DIR\n"
            f"python -m icetransfer.recommend --results results/{tree['sweep']}/results.csv "
            f"--hours {hours_label(max(r['hours'] for r in tree['results']))}"
            if tree["results"]
            else f"./run_all.sh --preset {tree['sweep']}"
        ),
    ]
