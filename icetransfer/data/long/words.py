"""The text of a long recording: words as they were written, and the tokens that are said for each.

The text is normalised sentence by sentence by the recipe's rules.  An entry keeps the words as they
were written, because stage 1 normalises what the utterances hold once more: "1914" is an entry, and
"neunzehnhundert vierzehn" is what is aligned.

Phrases are the parts of the text that are taken or left as a whole while it is aligned: a sentence,
or a dozen words of a long one.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import NamedTuple

from icetransfer.data.text.normalizer import FOLDED, Normalizer
from icetransfer.data.tokenizer import Tokenizer

PHRASE_WORDS = 12
#: Of a text's letters, how many may be foreign to the language before it is another language.
FOREIGN_SHARE = 0.1
#: A sentence ends at such a mark behind a word of two letters or more, so that "2. Weltkrieg" and
#: "z. B." are not parted, or at the end of a line.
_END = re.compile(r"(?<=[^\W\d_]{2}[.!?…:;])[\"'»”’)\]]*(?=\s)|\n|$")


class Entry(NamedTuple):
    """Some words of the text that are aligned together, most often one.

    Attributes:
        written: as the text has them, with their punctuation.
        said: normalised.
        tokens: of the model.
        phrase: the number of their phrase.
    """

    written: str
    said: str
    tokens: tuple[int, ...]
    phrase: int


@dataclass(frozen=True)
class LongText:
    """A text, ready to be aligned.

    Attributes:
        entries: in order.
        problems: of phrases that cannot be trained on, whatever is heard: why, by phrase.
        unspoken: what the text has that is not said (an event, a tag) or has no token at all.
    """

    entries: list[Entry]
    problems: dict[int, str]
    unspoken: list[str]


class Spelling:
    """Writes normalised text with the characters that a vocabulary has.

    A character that is not in it stands for the first of these that is: its capital, its base
    letter (é: e), the letters that the normaliser folds it to (ø: o, æ: ae), and their capitals.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, str | None] = {" ": " "}

    def __call__(self, text: str) -> tuple[str, str]:
        """Returns the text in characters of the vocabulary, and the characters that it lacks."""
        for character in set(text) - self._known.keys():
            self._known[character] = self._find(character)
        lacks = "".join(c for c in dict.fromkeys(text) if self._known[c] is None)
        return "".join(self._known[character] or "" for character in text), lacks

    def _find(self, character: str) -> str | None:
        base = unicodedata.normalize("NFKD", character)[0]
        for candidate in (character, base, FOLDED.get(base, base)):
            for spelt in (candidate, candidate.upper(), candidate.lower()):
                if spelt and not self._tokenizer.unknown_characters(spelt):
                    return spelt
        return "" if character in "'-·" or unicodedata.combining(character) else None


def read_long_text(text: str, normalizer: Normalizer, tokenizer: Tokenizer, name: str) -> LongText:
    """Splits a text into phrases and entries.

    Args:
        text: plain text; lines may be broken anywhere.
        normalizer: of the language.
        tokenizer: of the model.
        name: of the text, for errors.

    Raises:
        ValueError: there are no words in it, its letters are those of another language, or the
            model has no tokens for the language.
    """
    spelling = Spelling(tokenizer)
    entries: list[Entry] = []
    problems: dict[int, str] = {}
    unspoken: list[str] = []
    foreign, lacking = Counter[str](), Counter[str]()
    letters = phrase = 0
    for sentence in sentences(text):
        reading = normalizer.read(sentence)
        letters += len(reading.text.replace(" ", ""))
        outside = normalizer.outside(reading.text)
        foreign.update(c for c in reading.text if c in outside)
        found: list[Entry] = []
        for written, said in written_and_said(sentence, reading.text, normalizer):
            spelt, lacks = spelling(said)
            lacking.update(lacks)
            tokens = _tokens(spelt, tokenizer, bool(entries or found) and not normalizer.spaceless)
            if not tokens:
                unspoken.append(written)
                continue
            number = phrase + len(found) // PHRASE_WORDS
            found.append(Entry(written, said, tokens, number))
        if not found:
            unspoken += [] if reading.text else [sentence]
            continue
        reason = f"letters that {normalizer.name} does not have: {' '.join(outside)}"
        if outside or reading.doubts:
            problem = reason if outside else f"not sure what was said: {reading.doubts[0]}"
            problems |= {entry.phrase: problem for entry in found}
        entries += found
        phrase = found[-1].phrase + 1
    _check_letters(letters, foreign, lacking, normalizer, name)
    return LongText(entries, problems, unspoken)


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text, with one space between words."""
    text = unicodedata.normalize("NFC", text)
    begin = 0
    for end in _END.finditer(text):
        if joined := " ".join(text[begin : end.end()].split()):
            yield joined
        begin = end.end()


def written_and_said(sentence: str, said: str, normalizer: Normalizer) -> Iterator[tuple[str, str]]:
    """Pairs the words of a sentence as written with what is said for them.

    Words whose reading cannot be told apart, as those of an amount of money, stay together.

    Args:
        sentence: as written.
        said: the same, normalised as a whole.
        normalizer: what normalised it.
    """
    spaceless = normalizer.spaceless
    split = (lambda text: list(text.replace(" ", ""))) if spaceless else str.split
    parts = list(re.finditer(r"\S" if spaceless else r"\S+", sentence))
    words: list[str] = []
    origin: list[int] = []  # the part that each word comes from
    for number, part in enumerate(parts):
        of_part = split(normalizer.words(part[0]))
        words += of_part
        origin += [number] * len(of_part)
    groups = _groups(words, split(said), origin) if words else [(len(parts) - 1, split(said))]
    yield from _slices(sentence, parts, groups, "" if spaceless else " ")


def _groups(words: list[str], spoken: list[str], origin: list[int]) -> list[tuple[int, list[str]]]:
    """What is said, grouped by the parts that it comes from: the last part of each group."""
    groups: list[tuple[int, list[str]]] = []
    most = len(origin) - 1
    for kind, a1, a2, b1, b2 in SequenceMatcher(None, words, spoken, False).get_opcodes():
        pieces = [(a1, a2, b1, b2)]
        if kind == "equal":
            pieces = [(a1 + i, a1 + i + 1, b1 + i, b1 + i + 1) for i in range(a2 - a1)]
        for first, end, begin, stop in pieces:
            last = origin[min(max(end - 1, first), most)]
            if groups and (origin[min(first, most)] <= groups[-1][0] or begin == stop):
                before = groups.pop()
                groups.append((max(last, before[0]), before[1] + spoken[begin:stop]))
            else:
                groups.append((last, spoken[begin:stop]))
    return groups


def _slices(
    sentence: str, parts: list[re.Match[str]], groups: list[tuple[int, list[str]]], joint: str
) -> Iterator[tuple[str, str]]:
    """What is written for each group: from the end of the group before to that of its own.

    What nothing is said of, as a dash, goes with the words behind it, and at the end of a sentence
    with those before it.
    """
    if groups and not groups[0][1] and len(groups) > 1:
        groups = [(groups[1][0], groups[1][1]), *groups[2:]]
    begin = 0
    for number, (last, spoken) in enumerate(groups):
        is_last = number == len(groups) - 1
        end = len(sentence) if is_last else parts[last].end()
        if spoken:
            yield sentence[begin:end].strip(), joint.join(spoken)
        begin = end


def _tokens(spelt: str, tokenizer: Tokenizer, follows: bool) -> tuple[int, ...]:
    """Token ids of an entry; where characters are the tokens, the space before it is its own."""
    tokens = tokenizer.encode(spelt)
    if tokens and follows and tokenizer.space_id is not None:
        tokens = [tokenizer.space_id, *tokens]
    return tuple(tokens)


def _check_letters(
    letters: int, foreign: Counter[str], lacking: Counter[str], normalizer: Normalizer, name: str
) -> None:
    if not letters:
        raise ValueError(f"{name} has no words: write there what is said in the recording")
    if foreign.total() > FOREIGN_SHARE * letters:
        shown = " ".join(letter for letter, _ in foreign.most_common(12))
        raise ValueError(
            f"{name} does not look like {normalizer.name}: {foreign.total() / letters:.0%} of its "
            f"letters are others ({shown}); is it the text of this recording, and --language right?"
        )
    own = Counter({letter: n for letter, n in lacking.items() if letter in normalizer.alphabet})
    if own:
        shown = " ".join(letter for letter, _ in own.most_common(12))
        raise ValueError(
            f"{name}: the model has no tokens for {shown}, nor for a base letter of it: it was "
            f"trained on another alphabet. Fine-tune it to {normalizer.name} first, with a recipe "
            f"and what transcribed speech there is, and give that experiment: --exp DIR"
        )
