"""What normalisation did to a corpus's text, for a native speaker to read in five minutes.

Counts of parts of a corpus add up to those of the whole; they are JSON in between. Memory does not
grow with the corpus: past 50,000 different changes the rarer half is forgotten.
"""

from __future__ import annotations

from collections import Counter
from difflib import SequenceMatcher
from typing import Any

from icetransfer.data.text.normalizer import Normalizer, Reading
from icetransfer.stage.markdown import markdown_table

SHOWN = 100  # changes in the report, and characters, and what was taken out
_MOST = 50_000  # different changes that are kept
_EXAMPLE = 120  # characters of an example
_HEAD = """\
# What was done to the text of {name}

{sentences:,} sentences of {language}. In {changed:,} of them more was changed than capitals and
punctuation. Training and scoring use the text as it stands under "read". A native speaker should go
through this page: what is wrong here is wrong in every sentence like it. The rules are in
`{rules}`, and docs/text.md says how to change them.
"""


class TextChanges:
    """Counts of what happened to text, with an example of each."""

    def __init__(self) -> None:
        """Begins with no text."""
        self.sentences = 0
        self.changed = 0
        self.forgotten = 0
        self.changes: Counter[tuple[str, str]] = Counter()
        self.characters: Counter[str] = Counter()
        self.taken_out: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, written: str, reading: Reading, normalizer: Normalizer) -> None:
        """Counts what was done to a sentence.

        Args:
            written: As the corpus has it.
            reading: What the normaliser made of it.
            normalizer: That normaliser.
        """
        self.sentences += 1
        self.taken_out.update(reading.removed)
        if not reading.removed and normalizer.words(written) == reading.text:
            self._drop(written, reading.text)
            return
        self.changed += 1
        sentence = written
        for event in reading.removed:
            written = written.replace(event, " ", 1)
        parts = list(written) if normalizer.spaceless else written.split()
        words: list[str] = []
        origin: list[int] = []  # the part that each word comes from
        for number, part in enumerate(parts):
            of_part = normalizer.words(part).split()
            words += of_part
            origin += [number] * len(of_part)
        spoken = list(reading.text) if normalizer.spaceless else reading.text.split()
        touched: set[int] = set()
        joint = "" if normalizer.spaceless else " "
        for kind, a1, a2, b1, b2 in SequenceMatcher(None, words, spoken, False).get_opcodes():
            if kind == "equal" or not words:
                continue
            first, last = origin[min(a1, len(origin) - 1)], origin[max(a2 - 1, 0)]
            before = joint.join(parts[min(first, last) : max(first, last) + 1])
            touched.update(range(min(first, last), max(first, last) + 1))
            self._count(before, joint.join(spoken[b1:b2]), sentence)
        for number, part in enumerate(parts):
            if number not in touched:
                self._drop(part, normalizer.words(part))

    def _count(self, before: str, after: str, sentence: str, times: int = 1) -> None:
        key = before, after
        self.changes[key] += times
        self.examples.setdefault("\t".join(key), _shortened(sentence))
        if len(self.changes) > _MOST:
            kept = Counter(dict(self.changes.most_common(_MOST // 2)))
            self.forgotten += len(self.changes) - len(kept)
            for rare in self.changes.keys() - kept.keys():
                self.examples.pop("\t".join(rare), None)
            self.changes = kept

    def _drop(self, written: str, text: str) -> None:
        if not written.isalnum():
            odd = Counter(char for char in written if not char.isalnum() and not char.isspace())
            self.characters += odd - Counter(text)

    def leave_out(self, reason: str, sentence: str) -> None:
        """Counts a sentence that training does not get.

        Args:
            reason: Of a kind, without what is particular to the sentence.
            sentence: As the corpus has it; "" where its text is not known.
        """
        self.left_out[reason] += 1
        self.examples.setdefault(reason, _shortened(sentence))

    def update(self, other: TextChanges) -> None:
        """Adds the counts of other text."""
        self.sentences += other.sentences
        self.changed += other.changed
        self.forgotten += other.forgotten
        self.characters += other.characters
        self.taken_out += other.taken_out
        self.left_out += other.left_out
        for (before, after), count in other.changes.items():
            self._count(before, after, other.examples.get(f"{before}\t{after}", ""), count)
        for reason in other.left_out:
            self.examples.setdefault(reason, other.examples[reason])

    def to_json(self) -> dict[str, Any]:
        """Returns what `from_json` reads."""
        changes = [[before, after, count] for (before, after), count in self.changes.items()]
        return vars(self) | {"changes": changes}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TextChanges:
        """Returns the counts that `to_json` gave.

        Args:
            data: What it gave.
        """
        found = cls()
        for key, value in data.items():
            if key == "changes":
                found.changes = Counter({(before, after): n for before, after, n in value})
            else:
                setattr(
                    found,
                    key,
                    Counter(value) if isinstance(getattr(found, key), Counter) else value,
                )
        return found

    def report(self, name: str, normalizer: Normalizer, rules: str) -> str:
        """Returns the page for a native speaker, in Markdown.

        Args:
            name: Of the corpus.
            normalizer: Of its language.
            rules: Where the language's rules are.
        """
        head = _HEAD.format(
            name=name, language=normalizer.name, rules=rules,
            sentences=self.sentences, changed=self.changed,
        )  # fmt: skip
        most = self.changes.most_common(SHOWN)
        rest = len(self.changes) + self.forgotten - len(most)
        sections = [
            head,
            f"## The {len(most)} most frequent changes\n",
            _table(
                ("times", "written", "read", "for example"),
                [
                    (f"{count:,}", before, after, self.examples.get(f"{before}\t{after}", ""))
                    for (before, after), count in most
                ],
            ),
            f"{rest:,} other changes are rarer.\n" if rest else "",
            "## Characters that were dropped\n",
            _table(
                ("times", "character"),
                [(f"{n:,}", f"`{char}`") for char, n in self.characters.most_common(SHOWN)],
            ),
            "## Tags and events that were taken out\n",
            _table(
                ("times", "written"), [(f"{n:,}", x) for x, n in self.taken_out.most_common(SHOWN)]
            ),
            "## Recordings that were left out\n",
            _table(
                ("times", "reason", "for example"),
                [(f"{n:,}", x, self.examples.get(x, "")) for x, n in self.left_out.most_common()],
            ),
        ]
        return "\n".join(filter(None, sections))


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return markdown_table(head, [[*map(_cell, row)] for row in rows]) if rows else "None.\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _shortened(sentence: str) -> str:
    return sentence if len(sentence) <= _EXAMPLE else sentence[: _EXAMPLE - 1] + "…"
