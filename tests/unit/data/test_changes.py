"""The report of what normalisation did."""

import json
import random

import pytest

from icetransfer.data.text import changes
from icetransfer.data.text.changes import TextChanges
from icetransfer.data.text.normalizer import Normalizer

NL = Normalizer("nl")
SENTENCES = [
    "Dat kost 5 km, zei Ørsted.",
    "Ook 5 km! [gelach]",
    "Gewoon tekst, met punten…",
    "Van 3–5 dagen.",
    "T/m 12 a.u.b.",
]


def counted(sentences: list[str], normalizer: Normalizer = NL) -> TextChanges:
    found = TextChanges()
    for sentence in sentences:
        found.add(sentence, normalizer.read(sentence), normalizer)
    return found


def test_changes_are_counted_with_what_was_written() -> None:
    found = counted(SENTENCES)
    assert found.sentences == 5 and found.changed == 4
    assert found.changes == {
        ("5 km,", "vijf kilometer"): 1,
        ("Ørsted.", "orsted"): 1,
        ("5 km!", "vijf kilometer"): 1,
        ("3–5", "drie tot vijf"): 1,
        ("T/m 12 a.u.b.", "tot en met twaalf alstublieft"): 1,
    }
    assert found.characters == {",": 1, ".": 1, "…": 1}
    assert found.taken_out == {"[gelach]": 1}


def test_parts_add_up_to_the_whole() -> None:
    whole = counted(SENTENCES * 3)
    whole.leave_out("a reason", "One sentence")
    parts = TextChanges()
    for sentence in SENTENCES:
        part = counted([sentence] * 3)
        parts.update(TextChanges.from_json(json.loads(json.dumps(part.to_json()))))
    parts.leave_out("a reason", "One sentence")
    assert parts.to_json() == whole.to_json()


def test_memory_does_not_grow_with_the_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "_MOST", 50)
    numbers = [*range(3000), *[7] * 200]
    random.Random(1).shuffle(numbers)
    found = counted([f"nummer {number}" for number in numbers])
    assert len(found.changes) <= 50 and len(found.examples) <= 60
    assert found.changes.most_common(1) == [(("7", "zeven"), 201)]
    assert found.forgotten > 2000


def test_a_native_speaker_can_read_it() -> None:
    found = counted([*SENTENCES, "x | y &lt; <b>z</b>"])
    found.leave_out("not sure what was said: a Roman numeral", "Foo XIV")
    page = found.report("corpus", NL, "text/languages/nl.yaml")
    assert "6 sentences of Dutch. In 5 of them" in page
    assert "| 1 | 3–5 | drie tot vijf | Van 3–5 dagen. |" in page
    assert "| 1 | not sure what was said: a Roman numeral | Foo XIV |" in page
    assert "| 1 | [gelach] |" in page
    assert len(page.splitlines()) < 100


def test_a_corpus_of_which_nothing_was_changed() -> None:
    page = counted(["alles goed"]).report("corpus", NL, "rules")
    assert "In 0 of them" in page and page.count("None.") == 4
