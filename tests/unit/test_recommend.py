import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from icetransfer import recommend
from tests.unit.test_gap import pair, write_csv


def test_published_law() -> None:
    at_100 = recommend.from_published(100)
    assert at_100.choice == "ML"
    assert at_100.gap == pytest.approx(4.21, abs=1e-3)
    assert "2606.24169" in at_100.basis
    at_2500 = recommend.from_published(2500)
    assert at_2500.choice == "either"
    assert "extrapolation" not in at_2500.basis
    assert "extrapolation" in recommend.from_published(5000).basis
    of_minutes = recommend.from_published(0.1)
    assert of_minutes.choice == "ML"
    assert of_minutes.gap == recommend.from_published(10).gap < 40
    assert "not carried below 10h" in of_minutes.basis


@pytest.mark.parametrize(
    ("expected", "low", "high", "choice"),
    [
        (2.0, None, None, "ML"),
        (-2.0, -3.0, -1.0, "EN"),
        (2.0, -0.5, 4.0, "either"),
        (0.1, 0.05, 0.2, "either"),
    ],
)
def test_choice(expected: float, low: float | None, high: float | None, choice: str) -> None:
    assert recommend.choose(expected, low, high) == choice


def test_own_results(tmp_path: Path) -> None:
    rows = [
        row
        for hours, gap in ((1, 4), (2, 2), (4, 1))
        for language, extra in (("nl", 0.9), ("it", 1.1))
        for row in pair(30, 30 - gap * extra, hours=hours, language=language)
    ]
    path = write_csv(tmp_path / "results.csv", rows)
    law = recommend.from_results(1.5, path, None)
    assert law.choice == "ML"
    assert law.gap == pytest.approx(4 / 1.5, rel=1e-3)
    # two languages a tenth apart: sure enough of the sign, not of the size
    assert law.low is not None and law.high is not None
    assert law.low < 0.5 < 5 < law.high
    assert law.source == recommend.MINI
    assert "exponent 1.00" in law.basis
    assert "extrapolation" in recommend.from_results(10, path, 160).basis
    measured = recommend.from_results(2, path, None)
    assert measured.gap == pytest.approx(2)
    assert "measured" in measured.basis
    with pytest.raises(ValueError, match="no fp32 pair"):
        recommend.from_results(2, path, 320)


def test_one_amount_reaches_no_other(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "results.csv", pair(30, 26))
    with pytest.raises(ValueError, match="one amount of data"):
        recommend.from_results(10, path, None)


def sweep(tmp_path: Path, languages: dict[str, float]) -> Path:
    """Results at 100 to 800 h that halve with each doubling; gaps are scaled by language."""
    rows = [
        row
        for hours in (100, 200, 400, 800)
        for name, scale in languages.items()
        for row in pair(
            20 - hours / 100 + 400 / hours * scale, 20 - hours / 100, hours=hours, language=name
        )
    ]
    return write_csv(tmp_path / "sweep.csv", rows)


def test_a_language_rests_on_itself_where_it_can(tmp_path: Path) -> None:
    path = sweep(tmp_path, {"de": 1.0, "it": 2.0, "pl": 1.5})
    own = recommend.from_results(300, path, None, "it")
    assert own.gap == pytest.approx(2 * 400 / 300, rel=1e-4)
    assert "it itself" in own.basis
    assert own.source == recommend.OWN
    pooled = recommend.from_results(300, path, None)
    other = recommend.from_results(300, path, None, "fi")
    assert pooled.gap == other.gap == pytest.approx(1.5 * 400 / 300, rel=1e-4)
    assert "fi was not in the sweep" in other.basis
    # a language not seen is one more draw from the languages: sqrt(n + 1) times as uncertain
    ratio = (other.high - other.low) / (pooled.high - pooled.low)
    assert ratio == pytest.approx(2, rel=0.02)


def test_what_more_data_buys(tmp_path: Path) -> None:
    path = sweep(tmp_path, {"de": 1.0, "it": 2.0, "pl": 1.5})
    found = recommend.from_results(200, path, None)
    assert "twice the data (400h): expected gap +1.50" in found.more_data
    assert "WER of the ml start -2.00 points" in found.more_data
    assert "extrapolated" not in found.more_data
    assert "extrapolated" in recommend.from_results(800, path, None).more_data
    published = recommend.from_published(100)
    assert "twice the data (200h): expected gap +2.18" in published.more_data
    assert "under 0.25 at about 1975h" in published.more_data


def test_a_mini_sweep_says_nothing_of_real_hours(tmp_path: Path) -> None:
    rows = [row for hours in (0.03, 0.5) for row in pair(60, 60 - 1 / hours, hours=hours)]
    found = recommend.from_results(300, write_csv(tmp_path / "mini.csv", rows), None)
    assert found.source == recommend.PUBLISHED
    assert "too far from 300h" in found.basis
    assert found.gap == pytest.approx(recommend.from_published(300).gap)


def test_no_law_fits_but_the_neighbours_are_there(tmp_path: Path) -> None:
    rows = pair(30, 28, hours=1) + pair(30, 32, hours=4)
    found = recommend.from_results(2, write_csv(tmp_path / "results.csv", rows), None)
    assert found.gap == pytest.approx(0, abs=1e-9)
    assert "no power law fits" in found.basis


def test_a_plan_is_a_table(tmp_path: Path) -> None:
    path = sweep(tmp_path, {"de": 1.0, "it": 2.0, "pl": 1.5})
    plan = tmp_path / "plan.csv"
    plan.write_text("language,hours,chunk_ms\nde,100h,160\nfi,6000,\nit,200,320\n")
    console = Console(width=80, record=True, file=io.StringIO())
    table, notes = recommend.plan_table(recommend.read_plan(plan), path, full=False)
    console.print(table)
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert any(line.startswith("de 100h 160 ms ML +4.00 ") for line in lines)
    assert any(line.startswith("fi 6000h mean either ≈ +0 ") for line in lines)
    assert "it 200h 320 ms –" in lines
    assert len(lines) == 6, "no row is broken"
    assert notes[0].startswith("fi, 6000h, mean: Little is known here: 6000h lies outside")
    assert "160 ms" in notes[1] and notes[1].startswith("it, 200h, 320 ms: ")
    full, _ = recommend.plan_table(recommend.read_plan(plan), path, full=True)
    assert [str(column.header) for column in full.columns][-1] == "twice the data"


def test_an_extrapolation_says_how_little_is_known(tmp_path: Path) -> None:
    first, second, *_ = str(recommend.from_published(20)).splitlines()
    assert re.fullmatch(r"ML: expected WER\(en\) - WER\(ml\) about \+\d+ points", first)
    assert second.startswith("Little is known here: nobody has measured 20h")
    assert "Little is known" not in str(recommend.from_published(300))
    outside = recommend.from_results(1000, sweep(tmp_path, {"de": 1.0, "it": 2.0}), None)
    assert "1000h lies outside what" in outside.caution and "100h to 800h" in outside.caution


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("language\nde\n", "lacks the columns hours"),
        ("language,hours\n", "no line below"),
        ("language,hours\nde,many\n", "plan.csv:2: hours many"),
    ],
)
def test_bad_plans_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "plan.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        recommend.read_plan(tmp_path / "plan.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist; expected a CSV file"),
        ("language\nnl\n", "lacks the columns hours"),
        ("language,hours\n", "has no line below its header"),
        ("language,hours\nnl,much\n", "plan.csv:2: "),
    ],
)
def test_a_plan_that_is_none_says_why(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "plan.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        recommend.read_plan(path)
