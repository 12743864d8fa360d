"""ML, EN or a tie, for each language and amount of data, with how probable each is.

A tie is a gap within a margin that is not worth choosing by: half a point, or a twentieth of the
WER where that is more.  A start is named where it is better by more than the margin with a
probability of 90 %, a tie where the gap is within it so surely; anything else is open, and the
likeliest of the three is said with its probability.  Probabilities are shares of the hierarchical
model's draws (`hierarchy.py`), so the noise of test sets, of training runs and of the other
languages is in them.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from babel import Locale

from icetransfer.analysis import hierarchy
from icetransfer.analysis.hierarchy import Posterior
from icetransfer.analysis.significance import Array, percentile_interval
from icetransfer.analysis.sweep_results import COMPARED, Wers
from icetransfer.config import hours_label

SURE = 0.9
MARGIN = 0.5  # points
RELATIVE_MARGIN = 0.05  # of the WER
ML, EN, TIE, OPEN = "ML", "EN", "tie", "open"

Row = dict[str, Any]


def verdicts(wers: Wers) -> tuple[list[Row], list[Row]]:
    """What gap.json says of every language, and of all together.

    Returns:
        A row for each test set, language and amount of data, and one for each test set.
    """
    languages, models = [], []
    for test_set in sorted({point.test_set for point in wers}):
        measured = hierarchy.measured_gaps(wers, test_set)
        if not hierarchy.noise_is_known(measured):
            continue
        posterior = hierarchy.fit(measured)
        margins = _margins(wers, test_set)
        languages += [{"test_set": test_set} | row for row in _rows(posterior, margins)]
        models.append({"test_set": test_set} | _model_row(posterior))
    return languages, models


def _margins(wers: Wers, test_set: str) -> dict[tuple[str, float], float]:
    """The margin for each language and amount of data."""
    found = defaultdict(list)
    for point, by_init in wers.items():
        if point.test_set == test_set:
            for init in COMPARED:
                for (language, _), draws in by_init.get(init, {}).items():
                    found[language, point.hours].append(float(draws[0]))
    return {key: max(MARGIN, RELATIVE_MARGIN * float(np.mean(w))) for key, w in found.items()}


def _rows(posterior: Posterior, margins: Mapping[tuple[str, float], float]) -> list[Row]:
    rows = []
    for index, language in enumerate(posterior.languages):
        for column, hours in enumerate(posterior.hours):
            if (language, hours) not in margins:
                continue  # the cell is missing, though the model has an opinion
            draws, margin = posterior.own[:, index, column], margins[language, hours]
            shares = {
                ML: float((draws > margin).mean()),
                EN: float((draws < -margin).mean()),
                TIE: float((np.abs(draws) <= margin).mean()),
            }
            likeliest = max(shares, key=lambda name: shares[name])
            rows.append(
                {"language": language, "hours": hours}
                | _summary("gap", draws)
                | {"margin": margin}
                | {f"probability_{name.lower()}": share for name, share in shares.items()}
                | {"likeliest": likeliest}
                | {"start": likeliest if shares[likeliest] >= SURE else OPEN}
            )
    return rows


def _summary(name: str, draws: Array) -> Row:
    low, high = percentile_interval(draws)
    prefix = "ci" if name == "gap" else f"{name}_ci"
    return {name: float(draws.mean()), f"{prefix}_low": low, f"{prefix}_high": high}


def _model_row(posterior: Posterior) -> Row:
    """The means, effects and standard deviations of a test set."""
    by_hours = []
    for column, hours in enumerate(posterior.hours):
        at: Row = {"hours": hours} | _summary("gap", posterior.mean[:, column])
        if posterior.another is not None:
            at |= _summary("another", posterior.another[:, column])
        by_hours.append(at)
    row: Row = {"n_languages": len(posterior.languages), "mean": by_hours}
    if len(posterior.hours) > 1:
        doublings = np.log2(posterior.hours) - np.log2(posterior.hours).mean()
        slopes = posterior.mean @ doublings / (doublings**2).sum()
        row |= _summary("change_per_doubling", slopes)
    tiers, precisions = posterior.latency, posterior.precision
    return row | {
        "latency": [{"chunk_ms": tier} | _summary("effect", d) for tier, d in tiers.items()],
        "precision": [{"precision": n} | _summary("effect", d) for n, d in precisions.items()],
        "spread": {name: _summary("sd", draws) for name, draws in posterior.spread.items()},
        "effective_points": posterior.effective,
    }


def language_name(code: str) -> str:
    """The English name of a language, or its code where the CLDR has none."""
    name: str = Locale("en").languages.get(code.replace("-", "_")) or code
    return name


def sentence(rows: Sequence[Row]) -> str:
    """What to start from, language by language, in one sentence.

    Args:
        rows: of one test set, as `verdicts` gives them.
    """
    said: dict[str, list[str]] = defaultdict(list)
    for language in sorted({row["language"] for row in rows}):
        own = sorted((r for r in rows if r["language"] == language), key=lambda r: r["hours"])
        advice, amounts = _advice(own)
        name = language_name(language)
        said[advice].append(f"{name} ({amounts})" if amounts else name)
    known = list(_ADVICE.values())
    order = sorted(said, key=lambda advice: known.index(advice) if advice in known else len(known))
    text = "; ".join(advice.format(_listed(said[advice])) for advice in order)
    return text[:1].upper() + text[1:] + "."


#: What to say of languages with one verdict at all amounts that decide, in this order.
_ADVICE = {
    ML: "start from ML for {}",
    EN: "start from EN for {}",
    TIE: "for {} it does not matter",
    OPEN: "for {} these figures do not decide",
}


def _advice(rows: Sequence[Row]) -> tuple[str, str]:
    """What a language's verdicts come to, with {} for its name, and the amounts it holds for.

    No amounts are named where it holds for all of them, or where they stand in the text.
    """
    decided = [row for row in rows if row["start"] != OPEN]
    starts = [row["start"] for row in decided]
    if len(set(starts)) <= 1:
        amounts = [hours_label(row["hours"]) for row in decided]
        return _ADVICE[starts[0] if starts else OPEN], (
            _listed(amounts) if len(decided) < len(rows) else ""
        )
    runs: list[tuple[str, float, float]] = []  # of amounts with one verdict
    for row in decided:
        first = row["hours"]
        if runs and runs[-1][0] == row["start"]:
            first = runs.pop()[1]
        runs.append((row["start"], first, row["hours"]))
    texts = []
    for start, first, last in runs:
        amounts_of_run = f"at {hours_label(first)}"
        if first != last:
            amounts_of_run = f"from {hours_label(first)} to {hours_label(last)}"
        texts.append(f"{'either' if start == TIE else start} {amounts_of_run}")
    return f"for {{}} start from {_listed(texts)}", ""


def _listed(names: Sequence[str]) -> str:
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"
