"""When each word was spoken: the reference text aligned to the audio by the model's own CTC head.

The model with full context gives CTC posteriors, and Viterbi finds the likeliest path of the
reference's tokens through them (torchaudio).  CTC models say a token in a frame or two near its
beginning, so the path knows where words begin but not where they end; the audio's energy does.

How good that is, on words of a synthesiser put together at known times and aligned by Dutch models
of the mini preset: 90 % of the ends between 20 ms early and 12 ms late where 0.3 s of pause
followed, between 40 ms early and 70 ms late (105 ms, by a model of 8 minutes of data) where none
did; half of the beginnings within 30 ms.

Source: Graves et al., Connectionist temporal classification (2006).

Shapes: N streams, T feature frames (10 ms), T4 encoder outputs (40 ms), V vocabulary.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torchaudio.functional import forced_align, merge_tokens

from icetransfer.data.features import FRAME_SHIFT, fbank
from icetransfer.data.tokenizer import BLANK_ID, WORD_MARK
from icetransfer.model.transducer import TransducerModel
from icetransfer.streaming.search import Hypothesis

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # of characters that a vocabulary lacks
OUTPUT_FRAMES = 4  # feature frames of an encoder output
OUTPUT_SECONDS = OUTPUT_FRAMES * FRAME_SHIFT
QUIET = 0.2  # of the way from the recording's faint to its loud frames in log energy
PAUSE_FRAMES = 10  # quiet frames that end a word; fewer are the closure of a plosive


class SpokenWord(NamedTuple):
    """A word of a hypothesis, and the encoder frames of its first and of its last token."""

    text: str
    first: int
    last: int


class AlignedWord(NamedTuple):
    """A word of a reference, and when it was spoken, in seconds."""

    text: str
    start: float
    end: float


def spoken_words(hypothesis: Hypothesis, names: Sequence[str]) -> list[SpokenWord]:
    """Puts the tokens of a hypothesis together to words, as sentencepiece's decoding does.

    Byte tokens, `<0xE8>`, are joined to the characters that they are in UTF-8; a byte that is not
    of one becomes U+FFFD.  Words are parted by `▁` and by white space of any kind.

    Args:
        hypothesis: tokens and their frames.
        names: of all tokens, by id.
    """
    written, frames = b"", []
    for token, frame in zip(*hypothesis, strict=True):
        piece = _bytes_of(names[token])
        written += piece
        frames += [frame] * len(piece)
    words: list[SpokenWord] = []
    begin = 0
    for character in written.decode("utf-8", "surrogateescape"):  # a surrogate for each bad byte
        end = begin + len(character.encode("utf-8", "surrogateescape"))
        first, last, begin = frames[begin], frames[end - 1], end
        shown = "\ufffd" if "\udc80" <= character <= "\udcff" else character
        if character.isspace():
            words.append(SpokenWord("", first, last))
        elif words:
            words[-1] = SpokenWord(words[-1].text + shown, words[-1].first, last)
        else:
            words.append(SpokenWord(shown, first, last))
    return [word for word in words if word.text]


def _bytes_of(name: str) -> bytes:
    """What a token writes, in UTF-8."""
    if byte := BYTE_TOKEN.fullmatch(name):
        return bytes.fromhex(byte[1])
    return name.replace(WORD_MARK, " ").encode()


def word_end(energy: NDArray[np.float32], first: int, last: int) -> int:
    """Where a word ends: at the first pause within its frames, else at its last loud frame.

    Args:
        energy: (T,) log energy of a recording.
        first: a frame of the word's last token.
        last: where the next word begins, or T.

    Returns:
        The frame after the word's last.
    """
    faint, loud = np.percentile(energy, [5, 95])
    spoken = np.flatnonzero(energy[first:last] > faint + QUIET * (loud - faint))
    if len(spoken) == 0:
        return min(first + OUTPUT_FRAMES, last)
    pauses = np.flatnonzero(np.diff(spoken) > PAUSE_FRAMES)
    return first + int(spoken[pauses[0] if len(pauses) else -1]) + 1


@torch.inference_mode()
def align(
    model: TransducerModel, samples: NDArray[np.float32], words: Sequence[Sequence[int]]
) -> list[tuple[float, float]]:
    """When each word of a recording begins and ends, in seconds.

    Args:
        model: with a CTC head.
        samples: mono, 16 kHz, in [-1, 1].
        words: the tokens of each word, in order.

    Raises:
        ValueError: the model has no CTC head, or the recording is too short for the words.
    """
    if model.ctc_output is None:
        raise ValueError(
            "the model has no CTC head, which the alignment of references to the audio needs: "
            "train with transfer.ctc=true, or set decode.latency=false"
        )
    tokens = [token for word in words for token in word]
    if not tokens:
        return []
    features = torch.from_numpy(fbank(samples)).unsqueeze(0)
    out, _ = model.encode(features, torch.tensor([features.size(1)]))
    repeats = sum(a == b for a, b in itertools.pairwise(tokens))
    if len(tokens) + repeats > out.size(1):
        raise ValueError(
            f"{len(samples) / 16000:.2f} s of audio are too short for {len(tokens)} tokens"
        )
    path, scores = forced_align(model.ctc_output(out), torch.tensor([tokens]), blank=BLANK_ID)
    spans = merge_tokens(path[0], scores[0], blank=BLANK_ID)
    first_tokens = np.cumsum([0, *(len(word) for word in words)])
    begins = [OUTPUT_FRAMES * spans[i].start for i in first_tokens[:-1]] + [features.size(1)]
    energy = features[0].logsumexp(dim=1).numpy()
    return [
        (
            begins[i] * FRAME_SHIFT,
            word_end(energy, OUTPUT_FRAMES * spans[first_tokens[i + 1] - 1].start, begins[i + 1])
            * FRAME_SHIFT,
        )
        for i in range(len(words))
    ]
