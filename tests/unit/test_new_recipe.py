"""Recipes and text rules for languages that have none."""

import shutil
from pathlib import Path

import pytest
import yaml

from icetransfer import new_recipe, score
from icetransfer.data.text import normalizer as text
from icetransfer.data.tokenizer import Tokenizer, train_tokenizer

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


@pytest.mark.parametrize(
    ("code", "written", "expected"),
    [  # the CLDR's words of numbers, units, currencies; the spelling of each script
        ("ca-AD", "El col·legi, l’ŀ i 23 anys.", "el col·legi l'l i vint-i-tres anys"),
        ("ca-AD", "5,50 € a Gal·les, 12 %", "cinc euros cinquanta a gal·les dotze per cent"),
        ("ru", "23 км, 5 km, 1 000 $", "двадцать три км пять километров одна тысяча долларов сша"),
        ("cy", "23 o bobl, 5 km, £5", "dau ddeg tri o bobl pump cilometr pump punt prydain"),
        ("sv", "Det är −5 °C.", "det är minus fem grader celsius"),
        ("tr", "12 345", "on iki üç yüz kırk beş"),
        ("hi", "मेरे पास २३ किताबें हैं", "मेरे पास तेईस किताबें हैं"),
        ("he", "צה״ל הודיע: ג׳ירפה, צ'יפס", "צהל הודיע ג'ירפה צ'יפס"),
        ("he", "שָׁלוֹם עוֹלָם, רח׳ הרצל 23", "שלום עולם רח הרצל עשרים ושלוש"),
        ("ar", "السَّلامُ عَلَيْكُم كتـــاب", "السلام عليكم كتاب"),
        ("ar", "ﻻ ﺑﺄس، ٢٣ كتابًا", "لا بأس ثلاثة وعشرون كتابا"),
        ("zh", "我有 23 本书，Ｈello。", "我有二十三本书hello"),
        ("zh", "温度是-5°C", "温度是负五摄氏度"),
        ("ja", "東京　タワーは１２３円、ﾃｽﾄ。", "東京タワーは百二十三円テスト"),
        ("th", "ผมมี ๒๓ บาท และน้ำ", "ผมมียี่สิบสามบาทและน้ำ"),
    ],
)  # fmt: skip
def test_what_the_cldr_knows_is_read(root: Path, code: str, written: str, expected: str) -> None:
    new_recipe.make_recipe(root, code)
    normalizer = text.Normalizer(code)
    assert normalizer(written) == expected
    assert normalizer.read(expected) == (expected, [], [])


def test_a_decimal_without_a_word_for_its_sign_is_in_doubt(root: Path) -> None:
    new_recipe.make_recipe(root, "ru")
    assert text.Normalizer("ru").read("12,5 м").doubts == [
        "a decimal number, of which the rules have no word: 2,5"
    ]


@pytest.mark.parametrize("code", ["zh", "ja", "th", "yue-Hant"])
def test_a_script_without_spaces_has_characters_as_tokens_and_as_words(
    root: Path, code: str
) -> None:
    recipe = new_recipe.make_recipe(root, code)
    data = yaml.safe_load((recipe / "conf/default.yaml").read_text(encoding="utf-8"))["data"]
    assert data["tokens"] == "characters" and "vocab_size" not in data
    normalizer = text.Normalizer(code)
    assert normalizer.spaceless
    assert normalizer.scored(normalizer("ดี 今日")) == "ดี 今 日"


def test_japanese_speech_goes_through_to_a_character_error_rate(root: Path) -> None:
    """Normaliser, tokens and score, without a training in between."""
    new_recipe.make_recipe(root, "ja", "Japanese")
    normalizer = text.Normalizer("ja")
    said = [normalizer(written) for written in ("今日は１２３円です。", "明日は　雨です！")]
    assert [normalizer.check(words) for words in said] == [[], []]
    tokenizer = Tokenizer(train_tokenizer(said, 500, "characters"))
    heard = [tokenizer.decode(tokenizer.encode(words)) for words in said]
    assert heard == said
    rows = [
        score.Row(
            id=str(number), speaker="", ref=normalizer.scored(ref), hyp=normalizer.scored(hyp),
            raw_ref=ref, raw_hyp=hyp, audio_seconds=1.0, tokens=[], timestamps=[], failed=None,
        )
        for number, (ref, hyp) in enumerate(zip(said, [heard[0], "明日も雨"], strict=True))
    ]  # fmt: skip
    counts = score.word_errors(rows)
    assert (counts.substitutions, counts.deletions, counts.length) == (1, 2, 16)
    assert "CER 18.75 %: 3 errors in 16 characters" in score.errors_text(rows, "ja", True)
    assert "WER" not in score.errors_text(rows, "ja", True)


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
        ("cz", "Czech", "cz is not a language that the CLDR knows; Czech is cs"),
        ("cz", None, "cz is not a language"),
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
