"""Characters that are shapes of others, and what readers count as one."""

import pytest

from icetransfer.data.text.characters import close_up, compose, graphemes


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("ﬁ ﬂ ﬃ", "fi fl ffi"),
        ("ＡＢ１２：", "AB12:"),
        ("CO₂ H₂O", "CO2 H2O"),
        ("ĳs Ĳs ŀl", "ijs IJs l·l"),
        ("℃ ㎞ ㎡", "°C km m2"),
        ("Ⅳ ⅻ", "IV xii"),
        ("ﺑﺄس ﻻ", "بأس لا"),
        ("ﾃｽﾄ", "テスト"),
        ("e\u0301", "é"),
        ("1.º 2ª m² ½ № …", "1.º 2ª m² ½ № ..."),  # read in their own way
        ("น้ำ ຄຳ", "น้ำ ຄຳ"),  # NFKC would spell these vowels in another way
        ("a´ ¨", "a´ ¨"),
    ],
)
def test_other_shapes_become_the_plain_character(written: str, plain: str) -> None:
    assert compose(written) == plain
    assert compose(plain) == plain


def test_a_letter_with_its_marks_is_one() -> None:
    assert graphemes("สวัสดี") == ["ส", "วั", "ส", "ดี"]
    assert graphemes("किताब") == ["कि", "ता", "ब"]
    assert graphemes("né e") == ["n", "é", " ", "e"]
    assert graphemes("") == []


def test_spaces_stay_between_words_of_other_scripts() -> None:
    assert close_up("我 用 iphone pro 手机") == "我用iphone pro手机"
    assert close_up("สวัสดี ครับ") == "สวัสดีครับ"
