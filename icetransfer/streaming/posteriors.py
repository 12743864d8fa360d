"""What the CTC head hears in a recording of any length, in windows, so that memory does not grow.

Each window is encoded with the seconds before and after it, as a model with full context hears an
utterance; what it puts out for these is thrown away.  Posteriors lie in a file without a name,
which is gone when nobody reads it any more.

Shapes: F frames (40 ms) and T feature frames (10 ms) of the recording, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from icetransfer.data.features import fbank
from icetransfer.data.long.heard import OUTPUT_FRAMES, Heard, Peak, find_peaks
from icetransfer.data.utterances import SAMPLING_RATE
from icetransfer.model.transducer import TransducerModel

Samples = NDArray[np.float32]

FRAME_SAMPLES = OUTPUT_FRAMES * SAMPLING_RATE // 100
#: With the context, half a minute: about the longest that a recipe trains on.
WINDOW_FRAMES = 600
CONTEXT_FRAMES = 75
_TAIL_SAMPLES = SAMPLING_RATE // 2  # of silence, so that the last frames come out


class Window(NamedTuple):
    """Samples of some frames, with those around them.

    Attributes:
        samples: (num_samples,).
        skipped: frames at the beginning that are there as context.
        frames: frames that count.
    """

    samples: Samples
    skipped: int
    frames: int


def windows(pieces: Iterable[Samples]) -> Iterator[Window]:
    """Cuts a recording that comes in pieces into windows.

    Args:
        pieces: samples, mono, 16 kHz, in [-1, 1].
    """
    held = np.zeros(0, dtype=np.float32)
    skipped = 0
    whole = (WINDOW_FRAMES + CONTEXT_FRAMES) * FRAME_SAMPLES
    for piece in pieces:
        held = np.concatenate([held, piece])
        while len(held) >= skipped * FRAME_SAMPLES + whole:
            yield Window(held[: skipped * FRAME_SAMPLES + whole], skipped, WINDOW_FRAMES)
            held = held[(skipped + WINDOW_FRAMES - CONTEXT_FRAMES) * FRAME_SAMPLES :]
            skipped = CONTEXT_FRAMES
    frames = -(-len(held) // FRAME_SAMPLES) - skipped
    while frames > 0:  # one window, or two where most of the context after it counts too
        counted = min(frames, WINDOW_FRAMES)
        yield Window(np.pad(held, (0, _TAIL_SAMPLES + FRAME_SAMPLES)), skipped, counted)
        held = held[max(0, skipped + counted - CONTEXT_FRAMES) * FRAME_SAMPLES :]
        skipped, frames = CONTEXT_FRAMES, frames - counted


@torch.inference_mode()
def hear(
    model: TransducerModel,
    pieces: Iterable[Samples],
    folder: Path,
    done: Callable[[float], None],
) -> Heard:
    """Computes the posteriors of a recording.

    Args:
        model: with a CTC head.
        pieces: samples, mono, 16 kHz, in [-1, 1].
        folder: where the posteriors may lie: two bytes for each of F x V.
        done: is told the seconds of each window.

    Raises:
        ValueError: the recording is empty.
    """
    assert model.ctc_output is not None
    chunk_size = -1 if -1 in model.chunk_sizes else max(model.chunk_sizes)
    energies: list[NDArray[np.float32]] = []
    peaks: list[Peak] = []
    frames = 0
    with tempfile.TemporaryFile(dir=folder) as file:
        for window in windows(pieces):
            features = torch.from_numpy(fbank(window.samples))
            out, _ = model.encode(features[None], torch.tensor([len(features)]), chunk_size)
            log_probs = model.ctc_output(out)[0, window.skipped :][: window.frames]
            log_probs.numpy().astype(np.float16).tofile(file)
            _add_peaks(peaks, find_peaks(log_probs.argmax(dim=1).numpy(), frames))
            begin = OUTPUT_FRAMES * window.skipped
            counted = features[begin : begin + OUTPUT_FRAMES * window.frames]
            energies.append(counted.logsumexp(dim=1).numpy())
            frames += window.frames
            done(window.frames * FRAME_SAMPLES / SAMPLING_RATE)
        if not frames:
            raise ValueError("the audio is empty")
        file.flush()
        stored = np.memmap(file, np.float16, "r", shape=(frames, model.vocab_size))
    return Heard(stored, np.concatenate(energies), peaks)


def _add_peaks(peaks: list[Peak], more: list[Peak]) -> None:
    """Appends the peaks of a window; one that goes on from the window before is one with it."""
    if peaks and more and (peaks[-1].token, peaks[-1].end) == (more[0].token, more[0].first):
        peaks[-1] = peaks[-1]._replace(end=more.pop(0).end)
    peaks += more
