"""What text is written in: how often each character comes, and the strangers among them."""

from __future__ import annotations

import csv
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from icetransfer.data.corpora import reason_kind
from icetransfer.data.recordings import OUTSIDE
from icetransfer.data.utterances import Rejection

RARE = 20  # a letter that fewer training utterances have can hardly be learned
_EXAMPLES = 3  # utterances that are named for a character


@dataclass
class Letters:
    """The characters of a text.

    Attributes:
        alphabet: What training text may hold.
        counts: How often each character comes.
        utterances: How many utterances have it; exact below `RARE` and outside the alphabet.
        examples: The first ids of utterances that have it.
    """

    alphabet: frozenset[str]
    counts: Counter[str] = field(default_factory=Counter)
    utterances: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    _common: set[str] = field(default_factory=lambda: {" "})

    def add(self, name: str, text: str) -> None:
        """Counts the characters of an utterance.

        Args:
            name: Its id.
            text: Normalised.
        """
        self.counts.update(text)
        for char in set(text) - self._common:
            self.utterances[char] += 1
            examples = self.examples.setdefault(char, [])
            if len(examples) < _EXAMPLES:
                examples.append(name)
            if self.utterances[char] >= RARE and char in self.alphabet:
                self._common.add(char)

    @property
    def outside(self) -> set[str]:
        """The characters that are not of the alphabet."""
        return self.counts.keys() - self.alphabet


@dataclass
class LeftOut:
    """What stage 1 has left out of a corpus: its `_rejected.tsv`.

    Attributes:
        reasons: How many utterances for each reason, its particulars taken away.
        letters: How many for each character outside the alphabet.
        examples: The first ids for each of these characters.
    """

    reasons: Counter[str] = field(default_factory=Counter)
    letters: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)


def read_left_out(paths: Iterable[Path]) -> LeftOut:
    """Reads what was left out of every corpus; a file that is not there says nothing."""
    found = LeftOut()
    for path in paths:
        if not path.is_file():
            continue
        with path.open(encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
                rejection = Rejection(row["id"], row["path"], row["reason"], row["advice"] or "")
                found.reasons[reason_kind(rejection)] += 1
                for letter in rejection.reason.partition(OUTSIDE)[2].split():
                    found.letters[letter] += 1
                    examples = found.examples.setdefault(letter, [])
                    if len(examples) < _EXAMPLES:
                        examples.append(rejection.id)
    return found


@dataclass(frozen=True)
class Stranger:
    """A character that training hardly sees, or must not see.

    Attributes:
        char: The character.
        kind: "outside" the alphabet, or "rare".
        train: Training utterances that have it.
        held_out: Utterances of dev and test that have it.
        left_out: Utterances that stage 1 left out for it.
        examples: Ids of some, those that are left out last.
    """

    char: str
    kind: str
    train: int
    held_out: int
    left_out: int
    examples: Sequence[str]

    @property
    def name(self) -> str:
        """The character with its Unicode name, for it may not show: "ø U+00F8 LATIN ..."."""
        shown = self.char if self.char.isprintable() else " "
        return f"{shown} U+{ord(self.char):04X} {unicodedata.name(self.char, 'unnamed').lower()}"


def strangers(
    train: Sequence[Letters], held_out: Sequence[Letters], left_out: LeftOut
) -> list[Stranger]:
    """The characters outside the alphabet, then those of it that are rare; most frequent first.

    Args:
        train: Of the training manifests.
        held_out: Of dev and test.
        left_out: By stage 1.
    """
    alphabet = frozenset().union(*(own.alphabet for own in train))
    outside = set(left_out.letters) | {c for own in (*train, *held_out) for c in own.outside}
    of_train, of_others = _summed(train), _summed(held_out)
    rare = {c for c, count in of_train.items() if count < RARE and c not in outside and c != " "}
    rare |= {c for c in of_others if c in alphabet and c not in of_train and c != " "}
    found = []
    for char in outside | rare:
        examples = [name for own in (*train, *held_out) for name in own.examples.get(char, ())]
        found.append(
            Stranger(
                char,
                "outside" if char in outside else "rare",
                of_train[char],
                of_others[char],
                left_out.letters[char],
                (examples + left_out.examples.get(char, []))[:_EXAMPLES],
            )
        )
    return sorted(found, key=lambda s: (s.kind, -(s.train + s.held_out + s.left_out), s.char))


def _summed(parts: Sequence[Letters]) -> Counter[str]:
    total: Counter[str] = Counter()
    for own in parts:
        total.update(own.utterances)
    return total


def unseen(train: Sequence[Letters]) -> list[str]:
    """The letters of the alphabet that no training text has, sorted."""
    alphabet = frozenset().union(*(own.alphabet for own in train))
    seen = {char for own in train for char in own.counts}
    return sorted(alphabet - seen - {" "})
