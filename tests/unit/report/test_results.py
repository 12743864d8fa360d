"""The published results are what the code makes of their data."""

import json
import re
from pathlib import Path

import pytest

from icetransfer.analysis.gap_report import gap_table
from icetransfer.report.write import PUBLISHED_DATA, published_markdown

REPO = Path(__file__).resolve().parents[3]
RESULTS = REPO / "RESULTS.md"


def test_results_are_current() -> None:
    if not RESULTS.is_file():
        pytest.skip("nothing is published yet: there is no RESULTS.md")
    tree = json.loads((REPO / PUBLISHED_DATA / "report.json").read_text())
    text = RESULTS.read_text()
    assert text == published_markdown(tree), (
        "RESULTS.md is not current: python -m icetransfer.report --results results/mini "
        "--publish RESULTS.md"
    )
    for place in re.findall(r"\]\(([^)]+)\)", text):
        assert (REPO / place).is_file()


def test_the_readme_shows_the_published_output() -> None:
    tree = json.loads((REPO / PUBLISHED_DATA / "report.json").read_text())
    said = (REPO / "README.md").read_text().partition("it ends with")[2].partition("(shortened")[0]
    said = re.sub(r"[\s│]+", " ", said)
    rows = [row for row in gap_table(tree["gap"])[1] if row[1] == "fp32"]
    for _, _, data, languages, *cells in rows:
        assert " ".join([data, languages, *cells[:3]]) in said
    for remark in tree["remarks"]:
        assert remark.partition(" points; ")[0] in said, remark
