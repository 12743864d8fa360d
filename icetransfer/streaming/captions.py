"""Segments as text: a line each, JSON lines, SubRip and WebVTT subtitles."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from html import escape
from typing import Any

from icetransfer.streaming.segments import Segment, Word

WIDTH, LINES = 42, 2  # characters of a subtitle's line, and its lines
LONGEST = 7.0  # seconds that a subtitle stands


class Captions:
    """How the segments of one recording are written.

    Args:
        name: of the recording; None where there is only one.
    """

    suffix = ".txt"
    head = ""

    def __init__(self, name: str | None = None) -> None:
        self._name = name

    def __call__(self, segment: Segment) -> str:
        """What stands for the next segment, line feeds included: its times in seconds, its text."""
        name = f"{self._name}\t" if self._name else ""
        return f"{name}{segment.start:.2f}\t{segment.end:.2f}\t{segment.text}\n"


class JsonLines(Captions):
    """A JSON object a line, with each word's times and confidence."""

    suffix = ".jsonl"

    def __call__(self, segment: Segment) -> str:
        """A line."""
        words = [_facts(word) | {"word": word.text} for word in segment.words]
        tree: dict[str, Any] = {"file": self._name} if self._name else {}
        tree |= _facts(segment) | {"text": segment.text, "words": words}
        return json.dumps(tree, ensure_ascii=False) + "\n"


def _facts(spoken: Segment | Word) -> dict[str, Any]:
    times = {"start": round(spoken.start, 2), "end": round(spoken.end, 2)}
    return times | {"confidence": round(spoken.confidence, 3)}


class SubRip(Captions):
    """SubRip subtitles, which hold neither times nor confidences of words."""

    suffix = ".srt"

    def __init__(self, name: str | None = None) -> None:
        super().__init__(name)
        self._number = 0

    def __call__(self, segment: Segment) -> str:
        """Its subtitles, numbered on from the last one."""
        text = ""
        for words in subtitles(segment.words):
            self._number += 1
            shown = "\n".join(textwrap.wrap(" ".join(word.text for word in words), WIDTH))
            text += f"{self._number}\n{span(words, ',')}\n{shown}\n\n"
        return text


class WebVtt(Captions):
    """WebVTT subtitles: each word after its time, in the class of its confidence in tens of %."""

    suffix = ".vtt"
    head = "WEBVTT\n\n"

    def __call__(self, segment: Segment) -> str:
        """Its subtitles."""
        text = ""
        for words in subtitles(segment.words):
            timed = " ".join(
                f"<{clock(word.start, '.')}><c.p{10 * int(10 * word.confidence)}>"
                f"{escape(word.text, quote=False)}</c>"
                for word in words
            )
            text += f"{span(words, '.')}\n{timed}\n\n"
        return text


def subtitles(words: list[Word]) -> Iterator[list[Word]]:
    """Parts of a segment that fit a subtitle and stand no longer than `LONGEST`."""
    part: list[Word] = []
    for word in words:
        text = " ".join(w.text for w in [*part, word])
        if part and (len(textwrap.wrap(text, WIDTH)) > LINES or word.end - part[0].start > LONGEST):
            yield part
            part = []
        part.append(word)
    yield part


def span(words: list[Word], point: str) -> str:
    """From the first word's beginning to the last one's end."""
    return f"{clock(words[0].start, point)} --> {clock(words[-1].end, point)}"


def clock(seconds: float, point: str) -> str:
    """00:01:02.345, with that decimal point."""
    whole = round(1000 * seconds)
    return (
        f"{whole // 3600000:02d}:{whole // 60000 % 60:02d}:{whole // 1000 % 60:02d}"
        f"{point}{whole % 1000:03d}"
    )
