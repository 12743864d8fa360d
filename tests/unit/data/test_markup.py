"""What stands in a transcript and is not said."""

import pytest

from icetransfer.data.text.markup import MarkupRemover

REMOVE = MarkupRemover(events=["Gelächter"], missing=["unverständlich"])


@pytest.mark.parametrize(
    ("text", "words", "removed", "doubts"),
    [
        ("no markup, at all", "no markup, at all", [], 0),
        ("[laughter] yes <noise>", "yes", ["[laughter]", "<noise>"], 0),
        ("{Gelächter} ja (GELÄCHTER)", "ja", ["{Gelächter}", "(GELÄCHTER)"], 0),
        ("(music) la (soft music playing)", "la", ["(music)", "(soft music playing)"], 0),
        ("*coughs* sorry", "sorry", ["*coughs*"], 0),
        ("the WHO (the health organisation) said", "the WHO (the health organisation) said", [], 0),
        ("<b>bold</b> <br/> text", "bold text", ["<b>", "</b>", "<br/>"], 0),
        ("a footnote [12] here", "a footnote here", ["[12]"], 0),
        ("Marks &amp; Spencer&nbsp;&#39;s", "Marks & Spencer\xa0's", [], 0),
        ("&amp;lt;unk&amp;gt; and &lt;noise&gt;", "and", ["<unk>", "<noise>"], 1),
        ("he said <unk> then [inaudible]", "he said then", ["<unk>", "[inaudible]"], 2),
        ("[unverständlich] ja (inaudible)", "ja", ["[unverständlich]", "(inaudible)"], 2),
        ("they [the team] won", "they won", ["[the team]"], 1),
        ("an open [bracket", "an open [bracket", [], 1),
        ("♪ la la ♪", "la la", ["♪", "♪"], 1),
        ("3 < 5 and R&D; fine", "3 < 5 and R&D; fine", [], 0),
    ],
)
def test_what_is_not_said_goes(text: str, words: str, removed: list[str], doubts: int) -> None:
    found = REMOVE(text)
    assert found.text.split() == words.split()
    assert found.removed == removed
    assert len(found.doubts) == doubts, found.doubts
