import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from icetransfer import gap
from icetransfer.analysis import gap_report, laws
from icetransfer.analysis.sweep_results import read_results

COLUMNS = ["language", "init", "hours", "test_set", "chunk_ms", "precision", "wer"]


def write_csv(path: Path, rows: list[dict[str, object]]) -> Path:
    columns = [*COLUMNS, *sorted({key for row in rows for key in row} - set(COLUMNS))]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def pair(english: float, multilingual: float, **more: object) -> list[dict[str, object]]:
    base = {"language": "nl", "hours": 1, "test_set": "t", "chunk_ms": 160, "precision": "fp32"}
    return [
        base | {"init": "en", "wer": english} | more,
        base | {"init": "ml", "wer": multilingual} | more,
    ]


def analyse(tmp_path: Path, rows: list[dict[str, object]]) -> dict[str, object]:
    return gap.analyse(read_results(write_csv(tmp_path / "results.csv", rows)))


def test_published_two_points(tmp_path: Path) -> None:
    rows = pair(24.21, 20.0, hours=100) + pair(10.20, 10.0, hours=2500)
    (law,) = analyse(tmp_path, rows)["power_law"]
    assert law["b"] == pytest.approx(math.log(4.21 / 0.20) / math.log(25), abs=1e-5)
    assert round(law["b"], 2) == 0.95
    assert round(law["factor_per_doubling"], 2) == 0.52
    assert law["n_points"] == 2
    assert "cannot test" in law["method"]


def test_mean_gap_over_languages(tmp_path: Path) -> None:
    rows = pair(30, 27) + pair(20, 21, language="it") + pair(40, 36, language="pl")
    (row,) = analyse(tmp_path, rows)["mean_gap"]
    assert row["gap"] == pytest.approx((3 - 1 + 4) / 3)
    assert row["n_languages"] == 3
    # so few languages need Student's interval: the resamples alone would end at -1 and 4
    half = 4.303 * np.std([3, -1, 4], ddof=1) / math.sqrt(3)
    assert row["ci_high"] - row["ci_low"] == pytest.approx(2 * half, rel=0.1)
    assert row["ci_low"] < 0 < 2 < row["ci_high"]


def test_one_language_has_no_interval(tmp_path: Path) -> None:
    analysis = analyse(tmp_path, pair(30, 27))
    assert analysis["mean_gap"][0]["ci_low"] is None
    assert analysis["power_law"][0]["b"] is None
    text = gap_report.markdown(analysis, {})
    assert "no interval" in text
    assert "cannot be concluded" in text


def test_exact_law_is_recovered_with_gaps_on_both_sides_of_zero() -> None:
    hours = [0.05, 0.2, 1.0, 5.0]
    law = laws.fit_power_law(hours, [np.array([3 * h**-0.7]) for h in hours])
    assert law.a == pytest.approx(3, rel=1e-5)
    assert law.b == pytest.approx(0.7, abs=1e-5)
    negative = laws.fit_power_law(hours, [np.array([-2 * h**-0.5]) for h in hours])
    assert negative.a == pytest.approx(-2, rel=1e-5)
    assert negative.b == pytest.approx(0.5, abs=1e-5)
    mixed = laws.fit_power_law([1, 2, 4, 8], [np.array([g]) for g in (4.0, 2.0, 1.0, -0.1)])
    assert mixed.b is not None
    assert 0.9 < mixed.b < 1.3


def test_no_law_where_the_sign_changes() -> None:
    law = laws.fit_power_law([1, 2], [np.array([1.0]), np.array([-1.0])])
    assert law.b is None
    assert law.gap(5) is None
    flat = laws.fit_power_law([1, 2], [np.array([0.0]), np.array([0.0])])
    assert flat.b is None


def test_latency_spread_and_trend(tmp_path: Path) -> None:
    rows = pair(30, 27) + pair(28, 26, chunk_ms=640) + pair(25, 24.5, chunk_ms=-1)
    (row,) = analyse(tmp_path, rows)["latency"]
    assert row["chunk_ms"] == [160, 640, -1]
    assert row["spread"] == pytest.approx(2.5)
    assert row["trend"] == pytest.approx(2.5)


def test_quantisation_change_size_and_difference_between_inits(tmp_path: Path) -> None:
    rows = pair(30, 27, model_bytes=400) + pair(31, 29, precision="int8", model_bytes=100)
    rows += pair(20, 18, language="it", model_bytes=400)
    rows += pair(20, 19, language="it", precision="int8", model_bytes=100)
    (row,) = analyse(tmp_path, rows)["quantisation"]
    assert row["wer_change"] == pytest.approx((1 + 2 + 0 + 1) / 4)
    assert row["size_ratio"] == pytest.approx(4)
    assert row["ml_minus_en"] == pytest.approx(1)
    assert row["n"] == 4


def test_every_precision_has_its_row(tmp_path: Path) -> None:
    rows = pair(30, 27, model_bytes=400)
    for precision, cost, size in (("fp16", 0, 200), ("int8", 0.5, 120), ("int4", 2, 80)):
        rows += pair(30 + cost, 27 + cost, precision=precision, model_bytes=size)
    found = analyse(tmp_path, rows)["quantisation"]
    assert {row["precision"]: row["wer_change"] for row in found} == {
        "fp16": 0,
        "int4": 2,
        "int8": 0.5,
    }
    assert [row["size_ratio"] for row in found] == [2, 5, pytest.approx(10 / 3)]


def test_engines_and_seeds(tmp_path: Path) -> None:
    rows = pair(50, 40, engine="torch", seed=1) + pair(30, 27, engine="sherpa", seed=1)
    rows += pair(30, 28, engine="sherpa", seed=2)
    rows.append(pair(99, 0, engine="sherpa", seed=3)[0])  # has no ml partner
    analysis = analyse(tmp_path, rows)
    assert analysis["mean_gap"][0]["gap"] == pytest.approx(2.5)
    (noise,) = analysis["noise"]
    assert noise["gaps"] == [3, 2]
    assert noise["gap_sd"] == pytest.approx(math.sqrt(0.5))
    assert "standard deviation of 0.71" in gap_report.noise_text(analysis["noise"])


def test_random_init_takes_no_part(tmp_path: Path) -> None:
    rows = pair(30, 27)
    analysis = analyse(tmp_path, [*rows, rows[0] | {"init": "random", "wer": 90}])
    assert analysis["mean_gap"][0]["gap"] == pytest.approx(3)
    with pytest.raises(ValueError, match="no language has both"):
        analyse(tmp_path, [rows[0] | {"init": "random"}])


def test_utterances_are_resampled_where_they_are_at_hand(tmp_path: Path) -> None:
    for init, wrong in (("en", 20), ("ml", 10)):
        lines = [
            {"id": f"u{i}", "ref": "a b", "hyp": "a x" if i < wrong else "a b"} for i in range(40)
        ]
        (tmp_path / f"{init}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    english, multilingual = pair(25, 12.5)
    analysis = analyse(
        tmp_path, [english | {"recogs": "en.jsonl"}, multilingual | {"recogs": "ml.jsonl"}]
    )
    (row,) = analysis["mean_gap"]
    assert row["gap"] == pytest.approx(12.5)
    # paired: ten utterances of forty differ, by half of their words each
    expected = 50 * math.sqrt(0.25 * 0.75 / 40)
    assert (row["ci_high"] - row["ci_low"]) / 3.92 == pytest.approx(expected, rel=0.15)
    assert analysis["method"]["resampled"] == ["utterances"]


def test_same_input_same_output(tmp_path: Path) -> None:
    rows = pair(30, 27) + pair(20, 21, language="it")
    assert analyse(tmp_path, rows) == analyse(tmp_path, rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wer": "many"}, "results.csv:2: could not convert"),
        ({"hours": 0}, "hours=0.0 cannot be"),
        ({"wer": "nan"}, "wer=nan"),
        ({"engine": "kaldi"}, "engine 'kaldi' is none of"),
    ],
)
def test_bad_values_are_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    rows = pair(30, 27)
    with pytest.raises(ValueError, match=message):
        analyse(tmp_path, [rows[0] | change, rows[1]])


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read_results(tmp_path / "none.csv")
    (tmp_path / "few.csv").write_text("language,init\nnl,en\n")
    with pytest.raises(ValueError, match="lacks the columns hours, test_set"):
        read_results(tmp_path / "few.csv")
    rows = pair(30, 27)
    with pytest.raises(ValueError, match="two lines of nl, en"):
        analyse(tmp_path, [*rows, rows[0]])


def test_files_are_written(tmp_path: Path) -> None:
    rows = [
        row
        for hours in (1, 4)
        for language in ("nl", "it")
        for chunk_ms in (160, -1)
        for precision in ("fp32", "int8")
        for row in pair(
            30,
            30 - 4 / hours,
            hours=hours,
            language=language,
            chunk_ms=chunk_ms,
            precision=precision,
        )
    ]
    analysis = analyse(tmp_path, rows)
    gap_report.write(analysis, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "gap.json").read_text()) == analysis
    text = (tmp_path / "out" / "gap.md").read_text()
    assert "| t | fp32 | 1h | 2 | +4.00 | +4.00 |" in text
    assert (tmp_path / "out" / "gap-t.png").read_bytes().startswith(b"\x89PNG")


def law_sweep(tmp_path: Path, hours: list[float], law: Callable[[float], float]) -> dict:
    rows = [row for h in hours for row in pair(20 + law(h), 20, hours=h)]
    return analyse(tmp_path, rows)["power_law"][0]


@pytest.mark.parametrize(
    ("name", "law"),
    [
        ("power law", lambda h: 40 * h**-0.5),
        ("exponential", lambda h: 4 * math.exp(-h / 600)),
        ("offset power law", lambda h: 100 / h + 0.8),
    ],
)
def test_the_law_is_chosen_and_not_assumed(
    tmp_path: Path, name: str, law: Callable[[float], float]
) -> None:
    found = law_sweep(tmp_path, [100, 250, 500, 1000, 1750, 2500, 5000], law)
    assert found["chosen"] == name
    errors = {candidate["law"]: candidate["loo"] for candidate in found["candidates"]}
    assert errors[name] < 0.01
    few = law_sweep(tmp_path, [100, 500, 2500], law)
    assert few["chosen"] is None
    assert "too few for AICc" in few["choice"]
    assert law_sweep(tmp_path, [100, 500], law)["choice"].startswith("2 amounts")


def test_aicc_is_that_of_the_formula() -> None:
    hours, gaps = [1.0, 2, 4, 8, 16], np.array([4.0, 2.2, 0.9, 0.6, 0.2])
    found = laws.compare(hours, gaps).candidates[0]
    law = laws.fit_power_law(hours, [np.array([g]) for g in gaps])
    rest = sum((law.gap(h) - g) ** 2 for h, g in zip(hours, gaps, strict=True))
    # two parameters and the noise: 3
    assert found.aicc == pytest.approx(5 * math.log(rest / 5) + 6 + 2 * 3 * 4 / (5 - 3 - 1))


def test_hours_under_a_threshold(tmp_path: Path) -> None:
    near = law_sweep(tmp_path, [100, 400, 1600, 6400], lambda h: 100 / h)
    assert near["hours_under_threshold"]["hours"] == pytest.approx(400, rel=1e-3)
    assert not near["hours_under_threshold"]["extrapolated"]
    far = law_sweep(tmp_path, [1, 2], lambda h: 4 / h)
    assert far["hours_under_threshold"]["hours"] == pytest.approx(16, rel=1e-3)
    assert far["hours_under_threshold"]["extrapolated"]
    assert gap_report.threshold_text(far) == "16h (extrapolated)"
    rising = law_sweep(tmp_path, [1, 2, 4], lambda h: 1 + h / 10)
    assert rising["hours_under_threshold"]["hours"] is None
    assert gap_report.threshold_text(rising) == "none in reach (extrapolated)"
    negative = law_sweep(tmp_path, [1, 2, 4], lambda h: -1 / h)
    assert gap_report.threshold_text(negative).startswith("any")


def test_hours_that_ml_saves(tmp_path: Path) -> None:
    # EN: 50, 40, 30, 20 at 1, 2, 4, 8 h; ML has at 1 h what EN has at 2.83 h, and so on
    rows = [
        row
        for hours, wer in ((1, 50), (2, 40), (4, 30), (8, 20))
        for row in pair(wer, wer - 15, hours=hours)
    ]
    saved = analyse(tmp_path, rows)["hours_saved"]
    assert [row["ratio"] for row in saved] == pytest.approx([2**1.5, 2**1.5, 2, 1])
    assert [row["bound"] for row in saved] == [None, None, "at_least", "at_least"]
    assert gap_report.savings_text(saved[0]) == "2.8×"
    assert gap_report.savings_text(saved[2]) == "> 2.0×"
    worse = [row for h in (1, 2) for row in pair(30 - h, 50, hours=h)]
    assert {row["bound"] for row in analyse(tmp_path, worse)["hours_saved"]} == {"at_most"}


def test_curves_of_both_inits(tmp_path: Path) -> None:
    rows = pair(30, 27) + pair(20, 19, language="it") + pair(20, 15, hours=4)
    curves = analyse(tmp_path, rows)["wer_curve"]
    found = {(row["init"], row["hours"]): (row["wer"], row["n_languages"]) for row in curves}
    # it has no four hours, so it takes no part
    assert found == {("en", 1): (30, 1), ("ml", 1): (27, 1), ("en", 4): (20, 1), ("ml", 4): (15, 1)}


def test_what_cannot_be_concluded(tmp_path: Path) -> None:
    said = " ".join(analyse(tmp_path, pair(30, 27))["cannot_conclude"])
    for part in ("One language (nl)", "One amount", "One latency", "One precision", "One seed"):
        assert part in said
    rows = [
        row
        for hours in (1, 2, 4, 8, 16)
        for language in ("nl", "it", "pl", "de", "fr")
        for tier in (160, 320)
        for precision in ("fp32", "int8")
        for seed in (1, 2)
        for row in pair(
            *(30, 27),
            **{"hours": hours, "language": language, "chunk_ms": tier, "precision": precision},
            seed=seed,
        )
        if (language, hours) != ("pl", 4)
    ]
    said = analyse(tmp_path, rows)["cannot_conclude"]
    assert len(said) == 2
    assert "No recognised utterances" in said[0]
    assert "Gaps are missing of pl (4 of 20, as at 4h)" in said[1]
    two = " ".join(analyse(tmp_path, [r for r in rows if r["hours"] in (1, 2)])["cannot_conclude"])
    assert "Two amounts of data" in two
    assert "missing" not in two


def test_results_must_be_of_their_utterances(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text(json.dumps({"id": "a", "ref": "a b", "hyp": "a x"}) + "\n")
    english, multilingual = pair(40, 30, recogs="r.jsonl")
    with pytest.raises(ValueError, match=r"WER 50.00 %, but the results say 40.00 %"):
        analyse(tmp_path, [english, multilingual])


def test_a_folder_of_wer_json_is_the_same_as_results_csv(tmp_path: Path) -> None:
    rows = pair(50, 30, engine="sherpa", seed=1) + pair(40, 35, hours=2, engine="sherpa", seed=1)
    for number, row in enumerate(rows):
        (tmp_path / "exp" / str(number)).mkdir(parents=True)
        (tmp_path / "exp" / str(number) / "wer.json").write_text(json.dumps(row))
    from_folder = gap.analyse(read_results(tmp_path / "exp"))
    assert from_folder == analyse(tmp_path, rows)
    (tmp_path / "exp" / "0" / "wer.json").write_text(json.dumps({"language": "nl"}))
    with pytest.raises(ValueError, match=r"0/wer.json lacks init, hours"):
        read_results(tmp_path / "exp")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no results"):
        read_results(tmp_path / "empty")


def test_a_collapsed_training_is_in_no_mean(tmp_path: Path) -> None:
    silent, wordy = {"errors": 97, "deletions": 80}, {"errors": 97, "deletions": 20}
    rows = pair(30, 26, errors=30, deletions=5) + pair(33, 31, language="it")
    rows += [pair(97, 40, language="pl", **silent)[0], pair(97, 40, language="pl")[1]]
    rows += pair(97, 95, language="ro", **wordy)  # wrong, and not silent: it is a result
    analysis = analyse(tmp_path, rows)
    (row,) = analysis["mean_gap"]
    assert row["gap"] == pytest.approx((4 + 2 + 2) / 3) and row["n_languages"] == 3
    (left_out,) = analysis["left_out"]
    assert (left_out["language"], left_out["init"], left_out["wer"]) == ("pl", "en", 97)
    assert "1 results are in no mean" in analysis["cannot_conclude"][0]
    assert "pl en 1h (1)" in analysis["cannot_conclude"][0]
    assert gap_report.markdown(analysis, {}).count("pl en 1h") == 1
    assert analyse(tmp_path, pair(30, 26))["left_out"] == []
    with pytest.raises(ValueError, match="all 2 results are of models that say next to nothing"):
        analyse(tmp_path, pair(97, 98, **silent))
