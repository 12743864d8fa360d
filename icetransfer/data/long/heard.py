"""What a model's CTC head hears in a recording."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from icetransfer.data.features import FRAME_SHIFT
from icetransfer.data.tokenizer import BLANK_ID, WORD_MARK

OUTPUT_FRAMES = 4  # feature frames of a frame of the CTC head
OUTPUT_SECONDS = OUTPUT_FRAMES * FRAME_SHIFT


class Peak(NamedTuple):
    """A token of the greedy transcript, and the frames for which it is the likeliest."""

    token: int
    first: int
    end: int


@dataclass(frozen=True)
class Heard:
    """A recording, of F frames of 40 ms and T of 10 ms.

    Attributes:
        log_probs: (F, V) of the CTC head; on disk, where a recording is long.
        energy: (T,) log energy.
        peaks: the greedy transcript.
    """

    log_probs: NDArray[np.floating[Any]]
    energy: NDArray[np.float32]
    peaks: list[Peak]

    @property
    def frames(self) -> int:
        """F, of 40 ms."""
        return len(self.log_probs)

    def letters(self, names: Sequence[str]) -> tuple[str, list[int]]:
        """The greedy transcript without spaces, and the frame of each letter."""
        text: list[str] = []
        frames: list[int] = []
        for peak in self.peaks:
            letters = letters_of(names[peak.token])
            text.append(letters)
            frames += [peak.first] * len(letters)
        return "".join(text), frames

    def transcript(self, names: Sequence[str], first: int, end: int) -> str:
        """What the model hears between two frames."""
        pieces = (names[peak.token] for peak in self.peaks if first <= peak.first < end)
        return " ".join("".join(pieces).replace(WORD_MARK, " ").split())


def letters_of(name: str) -> str:
    """What a token writes, without spaces; nothing for special ones."""
    return "" if name.startswith("<") and name.endswith(">") else name.replace(WORD_MARK, "")


def find_peaks(best: NDArray[np.int64], first: int = 0) -> list[Peak]:
    """The peaks of the likeliest token of each frame.

    Args:
        best: (F,) token ids.
        first: the number of the first frame.
    """
    if not len(best):
        return []
    begins = np.flatnonzero(np.diff(best, prepend=best[0] - 1))
    ends = np.append(begins[1:], len(best))
    return [
        Peak(int(best[a]), first + int(a), first + int(b))
        for a, b in zip(begins, ends, strict=True)
        if best[a] != BLANK_ID
    ]
