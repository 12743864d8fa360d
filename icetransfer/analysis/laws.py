"""Laws of how the gap decays with the amount of training data, fitted and compared.

All are fitted by least squares on the linear scale, so that gaps at or below zero take part.  For a
given exponent or rate the rest of a law is linear and a projection finds it, so one number alone is
searched, on a grid and then between its neighbours (variable projection, Golub and Pereyra 1973).
That is done for all resamples at once.

Shapes: D draws (the first the data as they are), P amounts of data, S grid points, C coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar

from icetransfer.analysis.bootstrap import Interval, interval
from icetransfer.analysis.significance import Array

EXPONENTS = np.arange(-2, 6.001, 0.02, dtype=np.float64)  # where the fit looks for b
RATES = np.geomspace(1e-3, 100, 401, dtype=np.float64)  # and for 1/c
METHOD = "least squares on the linear scale"
REACH = 1000  # times the amounts measured: farther than that no threshold is looked for
CLEARLY = 2.0  # a difference in AICc that counts (Burnham and Anderson 2002, section 2.6)
CLOSE = 1.1  # leave-one-out errors that differ by less than this factor do not


@dataclass(frozen=True)
class Family:
    """A law with one number to search for and one or two that follow from it.

    Attributes:
        name: for people.
        formula: of the gap at h hours.
        grid: values of the searched number, (S,).
        curves: (hours relative to their geometric mean (P,), grid (S,)) -> (P, C, S).
        parameters: of the formula.
    """

    name: str
    formula: str
    grid: Array
    curves: Callable[[Array, Array], Array]
    parameters: int


def _power(x: Array, b: Array) -> Array:
    return (x[:, None] ** -b)[:, None]


def _exponential(x: Array, rate: Array) -> Array:
    return np.exp(-rate * x[:, None])[:, None]


def _offset_power(x: Array, b: Array) -> Array:
    power = x[:, None] ** -b
    return np.stack([power, np.ones_like(power)], axis=1)


POWER = Family("power law", "a h^-b", EXPONENTS, _power, 2)
FAMILIES = (
    POWER,
    Family("exponential", "a exp(-h / c)", RATES, _exponential, 2),
    Family("offset power law", "a h^-b + c", EXPONENTS[EXPONENTS >= 0.1], _offset_power, 3),
)


@dataclass(frozen=True)
class Fit:
    """A family fitted to every draw.

    Attributes:
        shape: the number searched for, (D,).
        coefficients: of the curves, (D, C).
        at_edge: the search ended at an end of the grid, (D,).
        centre: the geometric mean of the amounts, hours.
    """

    family: Family
    shape: Array
    coefficients: Array
    at_edge: Array
    centre: float

    def gaps(self, hours: float) -> Array:
        """The gap at an amount of data, (D,)."""
        curves = self.family.curves(np.array([hours / self.centre]), self.shape)[0]  # (C, D)
        values: Array = (curves.T * self.coefficients).sum(1)
        return values


def _explained(curves: Array, gaps: Array) -> tuple[Array, Array]:
    """The part of the gaps' squares that curves explain, (D, S), and orthonormal curves."""
    bases = curves / np.linalg.norm(curves, axis=0)
    if curves.shape[1] == 2:
        second = bases[:, 1] - (bases[:, 0] * bases[:, 1]).sum(0) * bases[:, 0]
        norm = np.maximum(np.linalg.norm(second, axis=0), 1e-9)
        bases = np.stack([bases[:, 0], second / norm], axis=1)
    found: Array = sum((gaps @ bases[:, c]) ** 2 for c in range(bases.shape[1]))
    return found, bases


def fit(family: Family, hours: Sequence[float], gaps: Array) -> Fit:
    """Fits a family to every draw.

    Args:
        family: what to fit.
        hours: amounts of training data, (P,).
        gaps: (D, P), finite.
    """
    x = np.asarray(hours, np.float64)
    # hours relative to their geometric mean: without it, steep laws lose all digits
    centre = float(np.exp(np.log(x).mean()))
    x = x / centre
    explained, _ = _explained(family.curves(x, family.grid), gaps)
    best = explained.argmax(1)
    at_edge = (best == 0) | (best == len(family.grid) - 1)
    shape = family.grid[best]
    inner = np.flatnonzero(~at_edge)
    # the top of the parabola through the best and its neighbours
    left, top, right = (explained[inner, best[inner] + step] for step in (-1, 0, 1))
    curvature = np.minimum(left - 2 * top + right, -1e-300)
    offset = np.clip((left - right) / (2 * curvature), -0.5, 0.5)
    step = np.where(offset > 0, family.grid[best[inner] + 1] - shape[inner], 0)
    step = np.where(offset < 0, shape[inner] - family.grid[best[inner] - 1], step)
    shape[inner] += offset * step
    if not at_edge[0]:
        shape[0] = _refined(family, x, gaps[0], int(best[0]))
    return Fit(family, shape, _coefficients(family, x, shape, gaps), at_edge, centre)


def _refined(family: Family, x: Array, gaps: Array, best: int) -> float:
    def unexplained(value: float) -> float:
        return -float(_explained(family.curves(x, np.array([value])), gaps[None])[0][0, 0])

    bounds = (family.grid[best - 1], family.grid[best + 1])
    return float(minimize_scalar(unexplained, bounds=bounds, options={"xatol": 1e-9}).x)


def _coefficients(family: Family, x: Array, shape: Array, gaps: Array) -> Array:
    curves = family.curves(x, shape)  # (P, C, D)
    normal = np.einsum("pcd,ped->dce", curves, curves)
    projected = np.einsum("pcd,dp->dc", curves, gaps)
    # two curves may be all but the same: a little on the diagonal keeps the system solvable
    size = np.trace(normal, axis1=1, axis2=2)[:, None, None]
    normal += 1e-12 * size * np.eye(normal.shape[1])
    found: Array = np.linalg.solve(normal, projected[..., None])[..., 0]
    return found


@dataclass(frozen=True)
class PowerLaw:
    """gap = a * hours^-b, fitted to one or more points; a and b None where that says nothing."""

    a: float | None
    b: float | None
    a_low: float | None
    a_high: float | None
    b_low: float | None
    b_high: float | None
    n_points: int
    method: str
    fitted: Fit | None = None

    @property
    def factor_per_doubling(self) -> float | None:
        """What a doubling of the hours multiplies the gap by."""
        return None if self.b is None else float(2**-self.b)

    @property
    def factor_interval(self) -> Interval:
        """Of that factor: the steepest law leaves least."""
        if self.b_low is None or self.b_high is None:
            return None, None
        return float(2**-self.b_high), float(2**-self.b_low)

    def gap(self, hours: float) -> float | None:
        """The gap expected at `hours`, in WER points."""
        return None if self.a is None or self.b is None else float(self.a * hours**-self.b)


def fit_power_law(hours: Sequence[float], gaps: Sequence[Array], languages: int = 1) -> PowerLaw:
    """Fits gap = a * hours^-b, with intervals from all draws.

    Args:
        hours: amounts of training data, (P,).
        gaps: the gap at each of them, P arrays (D,).
        languages: how many are in the gaps.
    """
    count = len(hours)
    if count < 2:
        reason = "one amount of data: no decay to be seen"
        return PowerLaw(None, None, None, None, None, None, count, reason)
    stacked = np.stack(gaps).T
    found = fit(POWER, hours, stacked)
    if found.at_edge[0] or not stacked[0].any():
        reason = "no power law with an exponent of -2 to 6 is nearest: the gap changes its sign"
        return PowerLaw(None, None, None, None, None, None, count, reason)
    b = found.shape
    a = found.coefficients[:, 0] * found.centre**b
    method = METHOD
    if count == 2:
        method += "; two points: they fix the law and cannot test it"
    cut = found.at_edge[1:]
    if cut.any():
        method += (
            f"; {100 * cut.mean():.0f} % of the resamples reach the edge of the search (-2 to 6), "
            f"where the interval of b is cut"
        )
    # a ranges over decades with b: its logarithm is what is near symmetric
    positive = np.log(np.where(a * a[0] > 0, abs(a), np.nan))
    bounds = [None if x is None else math.exp(x) for x in interval(positive, languages)]
    bounds = [None if x is None else math.copysign(x, a[0]) for x in bounds]
    a_low, a_high = bounds if a[0] > 0 else bounds[::-1]
    return PowerLaw(
        float(a[0]), float(b[0]), a_low, a_high, *interval(b, languages), count, method, found
    )


@dataclass(frozen=True)
class Threshold:
    """The amount of data at which the law's gap falls under a threshold; None: at no such amount.

    `extrapolated` says that it lies outside the amounts measured.
    """

    hours: float | None
    low: float | None
    high: float | None
    extrapolated: bool


def threshold(
    law: PowerLaw, points: float, hours: Sequence[float], languages: int = 1
) -> Threshold | None:
    """Where the law falls under `points`; None where there is no law.

    The gap of a falling law that begins negative is under it everywhere: then hours is 0.  A bound
    beyond a thousand times (or less than a thousandth of) the data is None.
    """
    if law.fitted is None:
        return None
    least, most = math.log(min(hours) / REACH), math.log(max(hours) * REACH)
    scale, b = law.fitted.coefficients[:, 0], law.fitted.shape
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(scale / points) / b + math.log(law.fitted.centre)
    # falling: under the threshold from there on.  Rising or flat: never; negative: always
    logs = np.where(scale <= 0, least, np.where(b <= 0, most, logs))
    logs = np.clip(logs, least, most)
    ends = [float(logs[0]), *interval(logs, languages)]
    amounts = [None if x is None or not least < x < most else math.exp(x) for x in ends]
    if scale[0] <= 0:
        amounts[0] = 0.0
    extrapolated = amounts[0] is None or not min(hours) <= amounts[0] <= max(hours)
    return Threshold(amounts[0], amounts[1], amounts[2], extrapolated)


@dataclass(frozen=True)
class Candidate:
    """A law beside others: None where there are too few amounts of data to tell.

    `aicc` is Akaike's criterion for small samples, with the noise as a parameter (Hurvich and Tsai
    1989); `loo` the root mean square of the errors at amounts left out in turn, in WER points.
    """

    law: str
    formula: str
    aicc: float | None
    loo: float | None


@dataclass(frozen=True)
class Choice:
    """Which law the data speak for: a name, or None with the reason."""

    candidates: tuple[Candidate, ...]
    chosen: str | None
    reason: str


def compare(hours: Sequence[float], gaps: Array) -> Choice:
    """Compares all laws on the gaps as they are, (P,)."""
    candidates = tuple(
        Candidate(f.name, f.formula, _aicc(f, hours, gaps), _leave_one_out(f, hours, gaps))
        for f in FAMILIES
    )
    if len(hours) < 3:
        return Choice(candidates, None, f"{len(hours)} amounts of data cannot tell laws apart")
    scored = sorted((c for c in candidates if c.aicc is not None), key=lambda c: c.aicc or 0.0)
    by_error = sorted((c for c in candidates if c.loo is not None), key=lambda c: c.loo or 0.0)
    if not scored:
        return Choice(
            candidates,
            None,
            f"{len(hours)} amounts of data are too few for AICc (5 are needed); {by_error[0].law} "
            f"predicts left-out amounts best, which so few do not settle",
        )
    best, second = scored[:2]
    lead = (second.aicc or 0.0) - (best.aicc or 0.0)
    if lead < CLEARLY:
        reason = f"{best.law} and {second.law} are within {lead:.1f} of AICc: not told apart"
        return Choice(candidates, None, reason)
    if (best.loo or 0.0) > CLOSE * (by_error[0].loo or 0.0):
        reason = f"AICc prefers {best.law}, the leave-one-out error {by_error[0].law}: not settled"
        return Choice(candidates, None, reason)
    reason = f"lowest AICc (by {lead:.1f}), and no law predicts left-out amounts clearly better"
    return Choice(candidates, best.law, reason)


def _aicc(family: Family, hours: Sequence[float], gaps: Array) -> float | None:
    count, parameters = len(hours), family.parameters + 1
    if count - parameters - 1 <= 0:
        return None
    found = fit(family, hours, gaps[None])
    residuals = gaps - np.array([found.gaps(h)[0] for h in hours])
    mean_square = _mean_square(residuals, gaps)
    correction = 2 * parameters * (parameters + 1) / (count - parameters - 1)
    return count * math.log(mean_square) + 2 * parameters + correction


def _leave_one_out(family: Family, hours: Sequence[float], gaps: Array) -> float | None:
    count = len(hours)
    if count < family.parameters + 1:
        return None
    errors = []
    for index in range(count):
        kept = [i for i in range(count) if i != index]
        found = fit(family, [hours[i] for i in kept], gaps[None, kept])
        errors.append(found.gaps(hours[index])[0] - gaps[index])
    return math.sqrt(_mean_square(np.array(errors), gaps))


def _mean_square(errors: Array, gaps: Array) -> float:
    """Of errors; an exact law has none left, and what rounding leaves there is no evidence."""
    return max(float((errors**2).mean()), 1e-10 * float((gaps**2).mean()), 1e-300)
