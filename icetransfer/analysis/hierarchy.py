"""Each language's gap, and their mean, from one hierarchical model that shrinks what is uncertain.

For language l, seed s, amount of data h, latency t and precision p, on one test set:

    gap = mean_h + latency_t + precision_p                  the same for all languages
        + own_l + slope_l x_h                               the language's, x_h in doublings of data
        + run_lsh                                           of this pair of trainings
        + special_lt + special_lp                           the language's at a latency or precision
        + rest + noise                                      noise: of the test set's utterances

The terms of a language, run and rest are normal with standard deviations of their own; the noise
has the covariance that drawing utterances gives (`bootstrap.py`), so cells decoded on the same
recordings are not counted as independent.  Means and effects have flat priors, the standard
deviations half-Student priors (4 degrees of freedom, Gelman 2006) as wide as the gaps themselves
are spread.  Given the standard deviations everything is Gaussian and exact (Lindley and Smith
1972); over them we integrate by adaptive importance sampling (Cappé et al. 2004).

A language that was measured badly is drawn towards the others, and one that differs from them
clearly is left alone.  `tests/unit/analysis/test_hierarchy.py` counts on made-up sweeps how often
the intervals hold the truth, and how often a verdict is wrong.

Shapes: L languages, H amounts, T latencies, P precisions, n gaps of a language, q effects,
G points of the standard deviations, K of them, S draws.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from icetransfer.analysis import significance
from icetransfer.analysis.significance import Array
from icetransfer.analysis.sweep_results import COMPARED, FULL, Point, Wers

DRAWS = 2000
POINTS, MOST_ROUNDS = 400, 15  # of the importance sampling
ENOUGH = 100  # effective points, of which it is content
TEMPERATURES = (1, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01, 0.003)
PRIOR_FREEDOM = 4.0
LEAST_SPREAD = 0.1  # points: no prior is narrower
BLOCK = 4_000_000  # numbers of a batch of covariance matrices


@dataclass(frozen=True)
class Measured:
    """A gap, and how the utterances that were drawn move it.

    Attributes:
        language: of the test set.
        seed: of both trainings.
        point: where it was measured.
        gap: WER(en) - WER(ml), points.
        noise: of drawn utterances, less the gap, (R,); zeros where they are not at hand.
    """

    language: str
    seed: int
    point: Point
    gap: float
    noise: Array


def measured_gaps(wers: Wers, test_set: str) -> list[Measured]:
    """The gaps on a test set, of every language, seed, amount, latency and precision."""
    found = []
    for point in sorted(point for point in wers if point.test_set == test_set):
        english, multilingual = (wers[point].get(init, {}) for init in COMPARED)
        for key in sorted(english.keys() & multilingual.keys()):
            draws = english[key] - multilingual[key]
            half = 1 + (len(draws) - 1) // 2
            noise = draws[half:] - draws[0]
            found.append(Measured(*key, point, float(draws[0]), noise))
    return found


def noise_is_known(measured: Sequence[Measured]) -> bool:
    """Whether there is anything to tell by how far these gaps may be from the truth."""
    return bool(_components(measured)) or any(m.noise.any() for m in measured)


@dataclass(frozen=True)
class Posterior:
    """What the gaps may be, given what was measured: S equally likely draws of each.

    Gaps are means over the latencies, of fp32 where it was measured.

    Attributes:
        languages: L, sorted.
        hours: H amounts, rising.
        mean: over languages like these, (S, H).
        own: of each language, (S, L, H).
        another: of a language that was not measured, (S, H); None for a sweep of one language.
        latency: chunk_ms -> how the gap there differs from the mean over latencies, (S,).
        precision: name -> how the gap differs from fp32's, (S,).
        spread: name of a standard deviation -> (S,).
        covariate: change of the gap with one unit of the covariate, (S,); None without.
        effective: how many independent points the importance sampling is worth.
    """

    languages: list[str]
    hours: list[float]
    mean: Array
    own: Array
    another: Array | None
    latency: dict[int, Array]
    precision: dict[str, Array]
    spread: dict[str, Array]
    covariate: Array | None
    effective: float


def fit(
    measured: Sequence[Measured],
    covariate: Mapping[str, float] | None = None,
    draws: int = DRAWS,
    seed: int = significance.SEED,
) -> Posterior:
    """Fits the model to the gaps on one test set.

    Args:
        measured: of `measured_gaps`.
        covariate: language -> a number that may explain its gap.
        draws: S.
        seed: of all draws.

    Raises:
        ValueError: nothing was measured, nothing is known of its noise (one language, measured once
            at each point, whose utterances are not at hand), or a language lacks the covariate.
    """
    if not measured:
        raise ValueError("no gap was measured on this test set")
    design = _Design.of(measured, covariate)
    if not noise_is_known(measured):
        raise ValueError("nothing is known of these gaps' noise: one language, no utterances")
    rng = np.random.default_rng(seed)
    points, weights = _standard_deviations(design, rng)
    chosen = rng.choice(len(points), size=draws, p=weights)
    used, place = np.unique(chosen, return_inverse=True)
    effects, own = _draw(design, points[used], place, rng)
    spread = {name: points[chosen, index] for index, name in enumerate(design.components)}
    return _posterior(design, effects, own, spread, float(1 / (weights**2).sum()), rng)


@dataclass(frozen=True)
class _Block:
    """What belongs to one language.

    Attributes:
        gaps: (n,).
        effects: design matrix of the means and effects, (n, q).
        own: that of the language's terms own_l and slope_l, (n, 2).
        noise: covariance, (n, n).
        components: covariance of a unit of each standard deviation, (K, n, n).
    """

    gaps: Array
    effects: Array
    own: Array
    noise: Array
    components: Array

    def covariance(self, deviations: Array) -> Array:
        """(G, n, n), at points (G, K)."""
        count = len(self.gaps)
        mixed = np.tensordot(deviations**2, self.components, 1)
        # where all noise is shared, rounding could make it singular
        ridge = 1e-8 * (1 + self.noise.diagonal().max()) * np.eye(count)
        result: Array = mixed + self.noise + ridge
        return result


@dataclass(frozen=True)
class _Design:
    """The model's matrices.

    Attributes:
        languages: L, as `blocks`.
        hours: H; the first H effects are the means there.
        doublings: x_h, (H,), with mean zero.
        tiers: T; the next T - 1 effects are of all but the last, which is less their sum.
        precisions: but the reference; the next effects.
        has_covariate: whether the last effect is one.
        components: names of the standard deviations, K.
        scale: of their priors, points.
    """

    languages: list[str]
    blocks: list[_Block]
    hours: list[float]
    doublings: Array
    tiers: list[int]
    precisions: list[str]
    has_covariate: bool
    components: list[str]
    scale: float

    @classmethod
    def of(cls, measured: Sequence[Measured], covariate: Mapping[str, float] | None) -> _Design:
        languages = sorted({m.language for m in measured})
        hours = sorted({m.point.hours for m in measured})
        tiers = sorted({m.point.chunk_ms for m in measured})
        precisions = sorted({m.point.precision for m in measured}, key=lambda p: (p != FULL, p))
        doublings = np.log2(hours) - np.log2(hours).mean()
        components = _components(measured)
        lacking = [name for name in languages if covariate is not None and name not in covariate]
        if lacking:
            raise ValueError(f"no covariate of {', '.join(lacking)}")
        values = np.array([covariate[name] for name in languages]) if covariate else np.zeros(0)
        blocks = []
        for index, language in enumerate(languages):
            own = [m for m in measured if m.language == language]
            columns = [_one_hot([m.point.hours for m in own], hours)]
            columns.append(_sum_to_zero([m.point.chunk_ms for m in own], tiers))
            columns.append(_one_hot([m.point.precision for m in own], precisions[1:]))
            if covariate is not None:
                columns.append(np.full((len(own), 1), values[index] - values.mean()))
            x = doublings[[hours.index(m.point.hours) for m in own]]
            blocks.append(
                _Block(
                    np.array([m.gap for m in own]),
                    np.hstack(columns),
                    np.stack([np.ones(len(own)), x], axis=1),
                    np.atleast_2d(np.cov(np.stack([m.noise for m in own]), bias=True)),
                    np.array([_COVARIANCES[name](own, x) for name in components]).reshape(
                        len(components), len(own), len(own)
                    ),
                )
            )
        return cls(
            *(languages, blocks, hours, doublings, tiers, precisions[1:]),
            *(covariate is not None, components, _spread(measured)),
        )


def _one_hot(values: Sequence[object], levels: Sequence[object]) -> Array:
    return np.array([[float(value == level) for level in levels] for value in values]).reshape(
        len(values), len(levels)
    )


def _sum_to_zero(values: Sequence[int], levels: Sequence[int]) -> Array:
    found = _one_hot(values, levels)
    return found[:, :-1] - found[:, -1:]


def _same(keys: Sequence[object]) -> Array:
    return np.array([[float(one == other) for other in keys] for one in keys])


#: Name of a standard deviation -> covariance of a unit of it, from a language's gaps and their x.
_COVARIANCES: dict[str, Callable[[Sequence[Measured], Array], Array]] = {
    "language": lambda own, x: np.ones((len(own), len(own))),
    "slope": lambda own, x: np.outer(x, x),
    "run": lambda own, x: _same([(m.seed, m.point.hours) for m in own]),
    "special": lambda own, x: (
        _same([m.point.chunk_ms for m in own]) + _same([m.point.precision for m in own])
    ),
    "rest": lambda own, x: np.eye(len(own)),
}


def _components(measured: Sequence[Measured]) -> list[str]:
    """The standard deviations that these gaps can say something of."""

    def several(key: str) -> bool:
        return len({getattr(m.point, key) for m in measured}) > 1

    languages = len({m.language for m in measured}) > 1
    cells = [(m.language, m.seed, m.point.hours) for m in measured]
    replicated = len({(cell[0], cell[2]) for cell in cells}) < len(set(cells))
    within = several("chunk_ms") or several("precision")
    wanted = {
        "language": languages,
        "slope": languages and several("hours"),
        "run": replicated or (languages and several("hours")),
        "special": languages and within,
        "rest": within,
    }
    return [name for name, is_wanted in wanted.items() if is_wanted]


def _spread(measured: Sequence[Measured]) -> float:
    """How far gaps of the same point are from one another."""
    groups = defaultdict(list)
    for m in measured:
        groups[m.point].append(m.gap)
    away = [gap - np.mean(group) for group in groups.values() if len(group) > 1 for gap in group]
    return max(LEAST_SPREAD, float(np.std(away)) if away else 0.0)


def _log_posterior(design: _Design, logs: Array) -> Array:
    """Of the logarithms of the standard deviations, up to a constant, (G,) at points (G, K)."""
    deviations = np.exp(logs)
    prior = stats.t.logpdf(deviations / design.scale, PRIOR_FREEDOM).sum(1) + logs.sum(1)
    likelihood = [_log_likelihood(design, part) for part in _parts(deviations, design.blocks)]
    result: Array = prior + np.concatenate(likelihood)
    return result


def _parts(points: Array, blocks: Sequence[_Block]) -> list[Array]:
    """Points, so many at a time as memory has room for."""
    size = max(1, BLOCK // max(len(block.gaps) for block in blocks) ** 2)
    return [points[start : start + size] for start in range(0, len(points), size)]


def _log_likelihood(design: _Design, deviations: Array) -> Array:
    """Of the gaps, the means and effects integrated out, (G,)."""
    precision, target, squares, logs = _sums(design, deviations)
    best = np.linalg.solve(precision, target[..., None])[..., 0]
    logs = logs + np.linalg.slogdet(precision)[1]
    result: Array = -0.5 * (logs + squares - np.einsum("gq,gq->g", target, best))
    return result


def _sums(design: _Design, deviations: Array) -> tuple[Array, Array, Array, Array]:
    """X'S^-1 X (G, q, q), X'S^-1 y (G, q), y'S^-1 y (G,) and log |S| (G,), over all languages."""
    count = design.blocks[0].effects.shape[1]
    precision = np.zeros((len(deviations), count, count))
    target = np.zeros((len(deviations), count))
    squares, logs = np.zeros(len(deviations)), np.zeros(len(deviations))
    for block in design.blocks:
        covariance = block.covariance(deviations)
        right = np.hstack([block.effects, block.gaps[:, None]])
        solved = np.linalg.solve(
            covariance, np.broadcast_to(right, (len(deviations), *right.shape))
        )
        precision += block.effects.T @ solved[..., :-1]
        target += solved[..., -1] @ block.effects
        squares += solved[..., -1] @ block.gaps
        logs += np.linalg.slogdet(covariance)[1]
    return precision, target, squares, logs


def _standard_deviations(design: _Design, rng: np.random.Generator) -> tuple[Array, Array]:
    """Points of the standard deviations, (G, K), and their weights, (G,)."""
    count = len(design.components)
    if count == 0:
        return np.zeros((1, 0)), np.ones(1)
    middle = np.full(count, math.log(design.scale) - 0.5)
    shape = np.eye(count)
    for _ in range(MOST_ROUNDS):
        proposal = stats.multivariate_t(middle, shape, df=PRIOR_FREEDOM, seed=rng)
        logs = proposal.rvs(POINTS).reshape(POINTS, count)
        # beyond these a standard deviation is zero, or dwarfs every gap
        logs = np.clip(logs, math.log(design.scale) - 7, math.log(design.scale) + 6)
        ratio = _log_posterior(design, logs) - proposal.logpdf(logs).reshape(POINTS)
        # A far-off proposal leaves all weight to one point: it moves by flattened weights then.
        for exponent in TEMPERATURES:
            weights = np.exp(exponent * (ratio - ratio.max()))
            weights /= weights.sum()
            if 1 / (weights**2).sum() >= ENOUGH:
                break
        if exponent == 1:
            break
        middle = weights @ logs
        away = logs - middle
        shape = 1.3 * (weights[:, None] * away).T @ away + 0.002 * np.eye(count)
    weights = np.exp(ratio - ratio.max())
    return np.exp(logs), weights / weights.sum()


def _draw(
    design: _Design, points: Array, place: NDArray[np.int64], rng: np.random.Generator
) -> tuple[Array, Array]:
    """Draws of the effects, (S, q), and of the languages' own terms, (S, L, 2).

    Args:
        design: the model.
        points: standard deviations, (G, K).
        place: which of them each draw has, (S,).
        rng: of the draws.
    """
    precision, target, _, _ = _sums(design, points)
    covariance = np.linalg.inv(precision)
    best = np.einsum("gqr,gr->gq", covariance, target)
    effects = best[place] + _normal(covariance[place], rng)
    own = np.zeros((len(place), len(design.blocks), 2))
    if "language" not in design.components:
        return effects, own
    prior = np.zeros((len(points), 2))
    for column, name in enumerate(("language", "slope")):
        if name in design.components:
            prior[:, column] = points[:, design.components.index(name)] ** 2
    for index, block in enumerate(design.blocks):
        pulled = prior[:, :, None] * block.own.T  # cov(own terms, gaps), (G, 2, n)
        right = np.swapaxes(pulled, 1, 2)
        solved = np.linalg.solve(block.covariance(points), right)  # (G, n, 2)
        left = np.einsum("gij,j->gi", np.swapaxes(solved, 1, 2), block.gaps)
        shift = np.swapaxes(solved, 1, 2) @ block.effects  # (G, 2, q)
        expected = left[place] - np.einsum("siq,sq->si", shift[place], effects)
        spread = prior[:, :, None] * np.eye(2) - pulled @ solved
        own[:, index] = expected + _normal(spread[place], rng)
    return effects, own


def _normal(covariance: NDArray[np.floating[Any]], rng: np.random.Generator) -> Array:
    """Draws with covariances (S, d, d), which may be singular, (S, d)."""
    values, vectors = np.linalg.eigh(covariance)
    roots = vectors * np.sqrt(np.maximum(values, 0))[:, None, :]
    result: Array = np.einsum("sij,sj->si", roots, rng.standard_normal(covariance.shape[:2]))
    return result


def _posterior(
    design: _Design,
    effects: Array,
    own: Array,
    spread: dict[str, Array],
    effective: float,
    rng: np.random.Generator,
) -> Posterior:
    amounts, tiers = len(design.hours), len(design.tiers)
    mean = effects[:, :amounts]
    basis = np.stack([np.ones(amounts), design.doublings])  # (2, H)
    another = None
    if "language" in spread:
        zeros = np.zeros(len(effects))
        deviations = np.stack([spread["language"], spread.get("slope", zeros)], axis=1)
        another = mean + (deviations * rng.standard_normal(deviations.shape)) @ basis
    of_tiers = effects[:, amounts : amounts + tiers - 1]
    of_tiers = np.hstack([of_tiers, -of_tiers.sum(1, keepdims=True)])
    first = amounts + tiers - 1
    by_language = mean[:, None] + own @ basis
    if design.has_covariate:
        # the same for every measurement of a language
        values = np.array([block.effects[0, -1] for block in design.blocks])
        by_language = by_language + effects[:, -1, None, None] * values[:, None]
    return Posterior(
        languages=design.languages,
        hours=design.hours,
        mean=mean,
        own=by_language,
        another=another,
        latency={tier: of_tiers[:, index] for index, tier in enumerate(design.tiers)},
        precision={name: effects[:, first + index] for index, name in enumerate(design.precisions)},
        spread=spread,
        covariate=effects[:, -1] if design.has_covariate else None,
        effective=effective,
    )
