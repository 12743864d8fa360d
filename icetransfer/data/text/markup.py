"""What stands in a transcript and is not said: entities, tags, and events in brackets.

`<b>` and `&amp;` are HTML. `[laughter]`, `<noise>` and `(music)` are events: nothing was said.
`<unk>` and `[inaudible]` stand where somebody spoke and nobody wrote it down: they go as well, and
training text that has one is in doubt. So is what stands in square brackets or in a tag and is none
of these. Round brackets hold words that are read, except where one of at most three is an event.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import NamedTuple

#: Events, as English transcripts name them.
EVENTS = frozenset({
    "applause", "background", "beep", "beeping", "bgn", "br", "breath", "breathes", "breathing",
    "cheer", "cheering", "cheers", "chuckle", "chuckles", "chuckling", "clap", "clapping",
    "claps", "clears", "click", "clicking", "cough", "coughing", "coughs", "cries", "cry",
    "crying", "gasp", "gasps", "giggle", "giggles", "laugh", "laughing", "laughs", "laughter",
    "lipsmack", "music", "musical", "noise", "noises", "nonspeech", "nsn", "pause", "ring",
    "ringing", "rustling", "sigh", "sighing", "sighs", "sil", "silence", "sneeze", "sneezes",
    "sniff", "sniffles", "sniffs", "sound", "spn", "static", "throat", "typing", "whistle",
    "whistles", "whistling", "yawn", "yawns",
})  # fmt: skip
#: Words for speech that was not written down.
MISSING = frozenset({
    "crosstalk", "foreign", "inaudible", "incomprehensible", "indistinct", "oov", "overlap",
    "overlapping", "pii", "redacted", "unclear", "unintelligible", "unk", "unknown", "xxx",
})  # fmt: skip
_HTML = frozenset({
    "a", "abbr", "b", "big", "br", "center", "cite", "code", "div", "em", "font", "h1", "h2",
    "h3", "hr", "i", "li", "mark", "ol", "p", "q", "s", "small", "span", "strike", "strong",
    "sub", "sup", "table", "td", "tr", "u", "ul",
})  # fmt: skip
_NEEDED = re.compile(r"[<>\[\]{}(*&♪♫♩♬]")
_ENTITY = re.compile(r"&(?:#\d{1,6}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z]\w{1,30});")
_BRACKETS = re.compile(
    r"<(?P<tag>/?[^<>\s][^<>]*)>|\[(?P<square>[^\[\]]*)\]|\{(?P<curly>[^{}]*)\}"
    r"|\((?P<round>[^()]*)\)|\*(?P<star>[^*\s][^*]*)\*"
)
_NOTES = re.compile("[♪♫♩♬]")
_MOST_WORDS = 3  # of an event in round brackets


class Stripped(NamedTuple):
    """A text without what is not said.

    Attributes:
        text: What is left.
        removed: What was taken out, as it was written.
        doubts: Why training should not have the text.
    """

    text: str
    removed: list[str]
    doubts: list[str]


class MarkupRemover:
    """Takes out what is not said."""

    def __init__(self, events: Iterable[str] = (), missing: Iterable[str] = ()) -> None:
        """Adds a language's words for events, and for speech not written down, to the English."""
        self._events = EVENTS | {word.casefold() for word in events}
        self._missing = MISSING | {word.casefold() for word in missing}

    def __call__(self, text: str) -> Stripped:
        """Returns the text without entities, tags, events and what stands for missing speech."""
        if not _NEEDED.search(text):
            return Stripped(text, [], [])
        for _ in range(2):  # "&amp;lt;" was escaped twice
            text = _ENTITY.sub(lambda match: html.unescape(match[0]), text)
        removed: list[str] = []
        doubts: list[str] = []

        def read(match: re.Match[str]) -> str:
            kind = str(match.lastgroup)
            inside = match[kind]
            words = re.findall(r"[^\W_]+", inside.casefold())
            if kind == "tag" and words and words[0] in _HTML:
                removed.append(match[0])
                return " "
            if kind in ("round", "star") and len(words) > _MOST_WORDS:
                return match[0]
            if self._missing.intersection(words):
                doubts.append(f"speech that is not written down: {match[0]}")
            elif self._events.intersection(words) or (
                kind == "square" and inside.strip().isdigit()
            ):
                pass
            elif kind in ("round", "star"):
                return match[0]
            elif words:
                doubts.append(f"brackets around what may be said or not: {match[0]}")
            removed.append(match[0])
            return " "

        text = _BRACKETS.sub(read, text)
        if notes := _NOTES.findall(text):
            doubts.append(f"song: {notes[0]}")
            removed += notes
            text = _NOTES.sub(" ", text)
        if re.search(r"[\[\]{}]", text):
            doubts.append("a bracket without its other half")
        return Stripped(text, removed, doubts)
