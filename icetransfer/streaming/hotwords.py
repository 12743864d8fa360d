"""Hotwords: names and terms that a beam search is to expect, and what each token of one is worth.

A file of hotwords has a phrase a line, which may end with a score of its own, as sherpa-onnx's:

    van der berg
    scheveningen :2.5

Every token that goes on with a phrase earns the phrase's score.  What was earned is taken back when
the phrase breaks off, and kept when it is complete.  The automaton is Aho and Corasick's (Efficient
string matching, 1975): of the phrases that the last tokens may have begun, it follows the longest.
After a complete phrase it starts again, so of two phrases of which one begins the other the shorter
one alone is found; sherpa-onnx does so too, and its scores are the same as those here.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from icetransfer.experiment import log
from icetransfer.stage.text import read_text

SCORE = 1.0  # of a token, where neither the file nor the user says another (docs/hotwords.md)
HIGHEST = 2.0  # above it, many phrases were heard that nobody had said
_ROOT = 0
_numbers = itertools.count()


class Hotword(NamedTuple):
    """A phrase to expect.

    Attributes:
        text: as the model spells it.
        tokens: of the text.
        score: what each token is worth, in natural logarithms of probability.
    """

    text: str
    tokens: tuple[int, ...]
    score: float


class HotwordGraph:
    """Phrases as an automaton that reads tokens; a state of it is a number, 0 at the start.

    Where phrases begin alike, a token that they share is worth the highest of their scores.

    Args:
        hotwords: the phrases.

    Attributes:
        number: tells graphs apart.
    """

    def __init__(self, hotwords: Sequence[Hotword]) -> None:
        self.number = next(_numbers)
        self._children: list[dict[int, int]] = [{}]
        self._bonus = [0.0]
        self._is_phrase = [False]
        for hotword in hotwords:
            self._add(hotword)
        self._earned, self._fail, self._match = self._link()

    def _add(self, hotword: Hotword) -> None:
        state = _ROOT
        for token in hotword.tokens:
            if token not in self._children[state]:
                self._children[state][token] = len(self._children)
                self._children.append({})
                self._bonus.append(hotword.score)
                self._is_phrase.append(False)
            state = self._children[state][token]
            self._bonus[state] = max(self._bonus[state], hotword.score)
        self._is_phrase[state] = True

    def _link(self) -> tuple[list[float], list[int], list[int]]:
        """What each state has earned, the state of its longest other suffix, its longest phrase."""
        size = len(self._children)
        earned, fail, match = [0.0] * size, [_ROOT] * size, [_ROOT] * size
        queue = [_ROOT]
        for state in queue:  # breadth first: suffixes are shorter, and come before
            match[state] = state if self._is_phrase[state] else match[fail[state]]
            for token, child in self._children[state].items():
                earned[child] = earned[state] + self._bonus[child]
                fail[child] = _ROOT if state == _ROOT else self._go(fail, fail[state], token)
                queue.append(child)
        return earned, fail, match

    def _go(self, fail: list[int], state: int, token: int) -> int:
        while token not in self._children[state] and state != _ROOT:
            state = fail[state]
        return self._children[state].get(token, _ROOT)

    def step(self, state: int, token: int) -> tuple[float, int]:
        """Reads a token.

        Returns:
            What it adds to the score, below zero where a phrase breaks off, and the next state.
        """
        following = self._go(self._fail, state, token)
        matched = self._match[following]
        kept = following if matched == _ROOT else matched
        return self._earned[kept] - self._earned[state], _ROOT if matched else following

    def unfinished(self, state: int) -> float:
        """What the phrase that has begun has earned, and loses if nothing follows."""
        return self._earned[state]


def read_hotwords(
    path: Path,
    encode: Callable[[str], list[int]],
    unknown: Callable[[str], str],
    normalize: Callable[[str], str] = str,
    score: float = SCORE,
) -> list[Hotword]:
    """Reads a file of hotwords.

    Args:
        path: a phrase a line; empty lines are left out.
        encode: gives the tokens of a text.
        unknown: gives the characters of a text that the tokens lack.
        normalize: makes of a phrase what the model says: small letters, numbers as words.
        score: of the phrases that have none of their own.

    Raises:
        ValueError: the file is missing or holds no phrase; or, with every bad line named, a phrase
            has characters that the model does not write, or a score is not one.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected hotwords, a phrase a line")
    found, problems = [], []
    for number, line in enumerate(read_text(path).lstrip("\ufeff").splitlines(), 1):
        if not line.strip():
            continue
        try:
            found.append(_read_line(line, encode, unknown, normalize, score))
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    if not found:
        raise ValueError(f"{path} holds no hotword; expected a phrase a line")
    return found


def _read_line(
    line: str,
    encode: Callable[[str], list[int]],
    unknown: Callable[[str], str],
    normalize: Callable[[str], str],
    score: float,
) -> Hotword:
    words = line.split()
    marked = [word for word in words if word.startswith(":")]
    if marked:
        if words[-1] != marked[0] or not re.fullmatch(r":\d+(\.\d+)?", marked[0]):
            raise ValueError(f"expected a phrase, or a phrase and a score as :2.5, got {line!r}")
        score = float(marked[0][1:])
        words.pop()
    if not math.isfinite(score) or score <= 0:
        raise ValueError(f"the score is {score:g}, expected a number above 0")
    text = normalize(" ".join(words))
    if not text:
        raise ValueError(f"{line.strip()!r} has no letter in it")
    if missing := unknown(text):
        raise ValueError(
            f"{text!r} has {missing!r}, which the model cannot write: spell it with the letters "
            f"of its tokens.txt"
        )
    return Hotword(text, tuple(encode(text)), score)


def warn_of_high_scores(hotwords: Sequence[Hotword]) -> None:
    """Says in the log which phrases have a score above `HIGHEST`."""
    high = [hotword.text for hotword in hotwords if hotword.score > HIGHEST]
    if high:
        log.warning(
            "%s%s: a score above %g makes the model hear hotwords that nobody said "
            "(docs/hotwords.md)", ", ".join(high[:3]), " ..." if len(high) > 3 else "", HIGHEST,
        )  # fmt: skip
