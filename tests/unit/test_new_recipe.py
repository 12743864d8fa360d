"""Recipes and text rules for languages that have none."""

import shutil
from pathlib import Path

import pytest
import yaml

from icetransfer import new_recipe
from icetransfer.data.text import normalizer as text

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with the template alone."""
    shutil.copytree(REPO / "egs/TEMPLATE", tmp_path / "egs/TEMPLATE")
    monkeypatch.setattr(text, "RECIPES_FOLDER", tmp_path / "egs")
    return tmp_path


@pytest.mark.parametrize(
    ("code", "name", "written", "expected"),
    [
        ("cy", "Welsh", "Mae’r TŶ'n fawr!", "mae'r tŷ'n fawr"),
        ("ru", "Russian", "Ёлка, ЩИ — и объезд.", "ёлка щи и объезд"),
        (
            "el",
            "Greek",
            "ΠΟΎ ΕΊΝΑΙ Ο ΔΡΌΜΟΣ; Ο δρόμος είναι...",
            "πού είναι ο δρόμος ο δρόμος είναι",
        ),
        ("tr", "Turkish", "IŞIK ve İstanbul’da DİL", "ışık ve istanbul'da dil"),
        ("uk", "Ukrainian", "П’ять м’ячів, її Їжак", "п'ять м'ячів її їжак"),
        ("sr-Latn", "Serbian (Latin)", "Đak ČITA", "đak čita"),
    ],
)
def test_text_rules(root: Path, code: str, name: str, written: str, expected: str) -> None:
    recipe = new_recipe.make_recipe(root, code)
    assert recipe == root / "egs" / code
    normalizer = text.Normalizer(code)
    assert normalizer.name == name
    assert normalizer(written) == expected
    assert normalizer.check(expected) == []
    assert code in text.languages()


def test_edited_rules_are_another_version(root: Path) -> None:
    rules = new_recipe.make_recipe(root, "cy") / "local/text.yaml"
    before = text.Normalizer("cy").version
    rules.write_text(rules.read_text().replace("apostrophe: keep", "apostrophe: remove"))
    after = text.Normalizer("cy")
    assert after("Mae'r tŷ") == "maer tŷ"
    assert before != after.version
    assert text.Normalizer("nl").version == f"nl-{text.VERSION}"


@pytest.mark.parametrize("code", ["ru", "sv", "tr", "fi", "ca"])
def test_number_rules_are_valid_once_completed(root: Path, code: str) -> None:
    rules = new_recipe.make_recipe(root, code) / "local/text.yaml"
    lines = rules.read_text().splitlines()
    first = lines.index("# numbers:")
    lines[first:] = [line.removeprefix("# ") for line in lines[first:]]
    rules.write_text("\n".join(lines))
    spoken = text.Normalizer(code)("12 345")
    assert spoken and not any(char.isdigit() for char in spoken)


def test_a_language_with_rules_gets_no_others(root: Path) -> None:
    assert not (new_recipe.make_recipe(root, "nl") / "local").exists()


def test_unlisted_three_letters_are_taken_on_trust(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = new_recipe.make_recipe(root, "qzz", "Ours")
    assert "its code was not checked" in capsys.readouterr().out
    rules = yaml.safe_load((recipe / "local/text.yaml").read_text())
    assert rules["alphabet"] == ""
    assert "write all its small letters here" in (recipe / "local/text.yaml").read_text()


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        ("../x", "Bad", "the code must be one of BCP 47"),
        ("CY", "Welsh", "the code must be one of BCP 47"),
        ("cz", "Czech", "cz is no language that the CLDR knows; Czech is cs"),
        ("cz", None, "cz is no language"),
        ("cy", " ", "one line of text"),
        ("cy", "Wel\nsh", "one line of text"),
    ],
)
def test_refused(root: Path, code: str, name: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        new_recipe.make_recipe(root, code, name)
    assert [path.name for path in (root / "egs").iterdir()] == ["TEMPLATE"]


def test_nothing_is_overwritten(root: Path) -> None:
    recipe = new_recipe.make_recipe(root, "cy")
    (recipe / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match="egs/cy is there already"):
        new_recipe.make_recipe(root, "cy")
    assert (recipe / "mine.txt").read_text() == "kept"
