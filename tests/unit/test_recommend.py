from pathlib import Path

import pytest

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
    assert law.low is not None
    assert law.low == pytest.approx(0.9 * 4 / 1.5, rel=1e-3)
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
