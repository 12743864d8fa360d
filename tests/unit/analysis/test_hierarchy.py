"""The hierarchical model and its verdicts, on made-up sweeps whose truth is known."""

from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from icetransfer.analysis import design, hierarchy, verdict
from icetransfer.analysis.hierarchy import Measured
from icetransfer.analysis.sweep_results import Point

HOURS = (0.1, 0.4, 1.6)
R = 300


class Sweep:
    """Gaps drawn as the model has them.

    Attributes:
        own: the true gap of each language, mean over the latencies, (L, H).
        mean: over all languages that could be, (H,).
        measured: what a sweep would give.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        languages: int,
        *,
        differ: float = 4.0,
        slope: float = 0.5,
        run: float = 1.5,
        rest: float = 0.5,
        noise: float = 1.0,
        seeds: Sequence[int] = (1,),
        tiers: Sequence[int] = (160, -1),
        tier_effect: float = 0.0,
    ) -> None:
        self.mean = np.array([3.0, 2.0, 1.0])
        x = np.log2(HOURS) - np.log2(HOURS).mean()
        self.own = (
            self.mean
            + differ * rng.standard_normal((languages, 1))
            + slope * rng.standard_normal((languages, 1)) * x
        )
        self.measured = []
        for language in range(languages):
            # one set of utterances: the same error in every cell of a language, and in every draw
            shared, draws = noise * rng.standard_normal(), noise * rng.standard_normal(R)
            for seed in seeds:
                for column, hours in enumerate(HOURS):
                    of_run = run * rng.standard_normal()
                    for index, tier in enumerate(tiers):
                        effect = tier_effect * (index - (len(tiers) - 1) / 2)
                        gap = self.own[language, column] + of_run + effect + shared
                        gap += rest * rng.standard_normal()
                        point = Point("t", "fp32", tier, hours)
                        self.measured.append(Measured(f"l{language}", seed, point, gap, draws))


def inside(draws: np.ndarray, truth: np.ndarray) -> np.ndarray:
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    return (low <= truth) & (truth <= high)


@pytest.mark.parametrize(
    ("languages", "settings"),
    [
        (3, {}),
        (8, {}),
        (8, {"differ": 0.0, "slope": 0.0, "run": 0.5}),
        (8, {"seeds": (1, 2)}),
    ],
    ids=["three", "eight", "eight alike", "two seeds"],
)
def test_intervals_hold_the_truth(languages: int, settings: dict[str, object]) -> None:
    rng = np.random.default_rng(3)
    own, mean, tiers, wrong, said = [], [], [], 0, 0
    for _ in range(20):
        sweep = Sweep(rng, languages, **settings)  # type: ignore[arg-type]
        found = hierarchy.fit(sweep.measured, draws=500)
        own.append(inside(found.own, sweep.own).mean())
        mean.append(inside(found.mean, sweep.mean).mean())
        tiers.append(float(inside(found.latency[160], np.zeros(()))))
        chosen = np.where((found.own > 0.5).mean(0) > verdict.SURE, 1, 0)
        chosen = np.where((found.own < -0.5).mean(0) > verdict.SURE, -1, chosen)
        said += int((chosen != 0).sum())
        wrong += int(((chosen != 0) & (np.sign(sweep.own) != chosen)).sum())
    shares = np.mean(own), np.mean(mean), np.mean(tiers)
    # 20 sweeps hold what 150 do (docs/statistics.md) but for their own noise
    assert min(shares) >= 0.85, shares
    # the start that is named is the worse one in few of the cases
    assert wrong <= 0.05 * max(said, 1), (wrong, said)


def test_a_noisy_language_is_drawn_towards_the_others_and_a_clear_one_is_not() -> None:
    rng = np.random.default_rng(1)
    measured = []
    for language, gap, noise in (*((f"l{i}", 2.0, 0.3) for i in range(6)), ("odd", 10.0, 6.0)):
        for hours in HOURS:
            point = Point("t", "fp32", 160, hours)
            draws = noise * rng.standard_normal(R)
            measured.append(Measured(language, 1, point, gap + 0.1 * rng.standard_normal(), draws))
    found = hierarchy.fit(measured)
    odd = found.own[:, found.languages.index("odd")].mean()
    assert odd < 6, "6 points of noise are no ground to stand alone on"
    clear = [
        m if m.language != "odd" else Measured("odd", 1, m.point, m.gap, m.noise / 30)
        for m in measured
    ]
    assert hierarchy.fit(clear).own[:, 6].mean() > 9


def test_effects_of_latency_precision_and_a_covariate_are_found() -> None:
    rng = np.random.default_rng(2)
    sweep = Sweep(rng, 8, tiers=(160, 320, -1), tier_effect=-2.0, noise=0.0, run=0.3, rest=0.2)
    related = {f"l{index}": index / 7 for index in range(8)}
    measured = []
    for m in sweep.measured:
        explained = 6 * related[m.language] - sweep.own[int(m.language[1:])].mean()
        for precision, change in (("fp32", 0.0), ("int8", 1.0)):
            point = m.point._replace(precision=precision)
            measured.append(Measured(m.language, 1, point, m.gap + explained + change, m.noise))
    found = hierarchy.fit(measured, related)
    assert found.latency[160].mean() == pytest.approx(2.0, abs=0.4)
    assert found.latency[-1].mean() == pytest.approx(-2.0, abs=0.4)
    assert found.precision["int8"].mean() == pytest.approx(1.0, abs=0.3)
    assert found.covariate is not None
    low, high = np.percentile(found.covariate, [2.5, 97.5])
    assert low < 6 < high and low > 3
    with pytest.raises(ValueError, match="no covariate of l7"):
        hierarchy.fit(measured, {name: 0.0 for name in list(related)[:7]})


def test_one_language_speaks_for_itself_and_draws_are_repeatable() -> None:
    sweep = Sweep(np.random.default_rng(4), 1, run=0.0, rest=0.0, noise=0.5)
    found = hierarchy.fit(sweep.measured)
    assert found.another is None
    assert np.allclose(found.own[:, 0], found.mean)
    assert np.array_equal(found.own, hierarchy.fit(sweep.measured).own)
    with pytest.raises(ValueError, match="no gap was measured"):
        hierarchy.fit([])


def _wers(gaps: dict[str, Sequence[float]], wer: float = 20.0) -> verdict.Wers:
    """WERs with these gaps at HOURS, exactly."""
    found: verdict.Wers = {}
    for column, hours in enumerate(HOURS):
        english = {(name, 1): np.full(3, wer + own[column]) for name, own in gaps.items()}
        multilingual = {(name, 1): np.full(3, wer) for name in gaps}
        point = Point("t", "fp32", 160, hours)
        found[point] = {"en": english, "ml": multilingual}
    return found


def test_the_sentence_names_each_language_once() -> None:
    rows, (model,) = verdict.verdicts(
        _wers({"it": (9, 8, 7), "nl": (0, 0.1, 0), "pl": (-9, -8, -7), "es": (0.1, 0, 0.1)})
    )
    assert {(row["language"], row["start"]) for row in rows} == {
        ("it", "ML"), ("nl", "tie"), ("pl", "EN"), ("es", "tie"),
    }  # fmt: skip
    margins = {row["margin"] for row in rows if row["language"] == "it" and row["hours"] == 0.1}
    assert list(margins) == pytest.approx([0.05 * (20 + 29) / 2])
    assert verdict.sentence(rows) == (
        "Start from ML for Italian; start from EN for Polish; for Spanish and Dutch it does not "
        "matter."
    )
    assert model["n_languages"] == 4 and len(model["mean"]) == 3
    for row in rows:
        total = sum(row[f"probability_{name}"] for name in ("ml", "en", "tie"))
        assert total == pytest.approx(1)


def test_a_start_that_changes_with_the_data_is_said_by_amount() -> None:
    def row(hours: float, start: str) -> verdict.Row:
        return {"language": "nl", "hours": hours, "start": start}

    rows = [row(0.1, "ML"), row(0.5, "ML"), row(1, "open"), row(2, "EN")]
    assert verdict.sentence(rows) == "For Dutch start from ML from 6min to 30min and EN at 2h."
    rows = [row(0.1, "open"), row(1, "open")]
    assert verdict.sentence(rows) == "For Dutch these figures do not decide."
    rows = [row(0.1, "ML"), row(0.5, "ML"), row(1, "open")]
    assert verdict.sentence(rows) == "Start from ML for Dutch (6min and 30min)."


def test_a_design_that_was_computed_sees_its_gap_as_often_as_it_says() -> None:
    """Sweeps of the size that `design` asks for, drawn from the noise that it was told."""
    noise = design.Noise(language=3.0, run=1.5, utterances=1.0, rest=0.5)
    needed = design.languages_needed(noise, 4.0, 1, 1)
    assert needed is not None
    # languages differ, which neither seeds nor longer test sets change
    assert needed - 3 < (design.languages_needed(noise, 4.0, 5, 4) or 0) < needed
    assert design.languages_needed(noise, 0.5, 5, 4) is None
    rng = np.random.default_rng(5)
    gaps = 4.0 + noise.of_mean(1, 1, 1) * rng.standard_normal((4000, needed))
    statistic = gaps.mean(1) / (gaps.std(1, ddof=1) / np.sqrt(needed))
    assert 0.89 < (statistic > stats.t.ppf(0.95, needed - 1)).mean() < 0.97
    error = noise.of_language(2, 4)
    seen = design.smallest_gap(error) + error * rng.standard_normal(4000) > 1.645 * error
    assert seen.mean() == pytest.approx(design.POWER, abs=0.02)


def test_the_noise_of_a_sweep_is_told_apart() -> None:
    rng = np.random.default_rng(6)
    sweep = Sweep(rng, 8, differ=4.0, slope=0.0, run=2.0, rest=0.2, noise=1.0, seeds=(1, 2, 3))
    posterior = hierarchy.fit(sweep.measured)
    assert posterior.effective >= hierarchy.ENOUGH
    found = design.noise_of(posterior, sweep.measured)
    assert found.run == pytest.approx(2.0, rel=0.25)
    assert found.utterances == pytest.approx(1.0, rel=0.1)
    assert found.language == pytest.approx(4.0, rel=0.5)
    assert found.rest < 0.4
