"""Where a recording is quiet enough to be cut."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from icetransfer.data.features import FRAME_SHIFT

QUIET = 0.35  # of the way from faint to loud frames, in log energy
RANGE = 9.2  # from the loudest speech to what counts as faint at most: 40 dB, in log energy
_LEVEL_FRAMES = 2000  # of 10 ms, of which what is faint and what is loud are told
_SOFTER = 2.3  # 10 dB by which a stretch may be softer than the whole before it is no speech


def quiet_frames(energy: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Whether each frame of 10 ms is a part of a pause.

    Loud and faint are told of 20 s at a time, because levels drift in long recordings.  Digital
    silence, as between chapters, is fainter than any pause of a speaker, and must not make those
    loud: so what counts as faint is bounded.

    Args:
        energy: (T,) log energy.
    """
    quiet = np.zeros(len(energy), dtype=np.bool_)
    if not len(energy):
        return quiet
    loudest = float(np.percentile(energy, 95))
    for first in range(0, len(energy), _LEVEL_FRAMES):
        part = energy[first : first + _LEVEL_FRAMES]
        around = energy[max(0, first - _LEVEL_FRAMES // 2) : first + 3 * _LEVEL_FRAMES // 2]
        faint, loud = (float(level) for level in np.percentile(around, [5, 95]))
        loud = max(loud, loudest - _SOFTER)
        faint = max(faint, loud - RANGE)
        quiet[first : first + len(part)] = part <= faint + QUIET * (loud - faint)
    return quiet


def quiet_runs(
    quiet: NDArray[np.bool_], first: int, end: int, seconds: float
) -> list[tuple[int, int]]:
    """The runs of quiet frames in a range that are at least so long, as ranges.

    Args:
        quiet: (T,).
        first: the first frame of the range.
        end: the frame after its last.
        seconds: the shortest run.
    """
    inside = np.concatenate([[False], quiet[max(first, 0) : end], [False]]).astype(np.int8)
    edges = np.flatnonzero(np.diff(inside)) + max(first, 0)
    runs = zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
    return [(a, b) for a, b in runs if (b - a) * FRAME_SHIFT >= seconds - 1e-9]
