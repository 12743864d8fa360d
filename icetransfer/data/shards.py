"""Stored features: a shard is a .npy array of many cuts' frames, and a cut is some of its rows.

Rows are read, not mapped into memory: when a file is cut short under a map, the system ends the
process with SIGBUS, without a word.

Legend: T feature frames (10 ms).
"""

import functools
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from lhotse.features.io import FeaturesReader, register_reader
from numpy.typing import NDArray

from icetransfer.stage import atomic

NUM_BINS = 80
ROW_TYPE = np.dtype(np.float16)  # about 0.004 in a log-mel of 10
ROW_BYTES = NUM_BINS * ROW_TYPE.itemsize


def write_shard(path: Path, matrices: Sequence[NDArray[np.float32]]) -> list[str]:
    """Writes features (T, 80) one after the other to a shard, whole or not at all.

    Returns:
        The key of each matrix, "first:last" row.
    """
    ends = np.cumsum([0, *map(len, matrices)])
    with atomic.atomic_path(path) as temporary:
        none = np.zeros((0, NUM_BINS), ROW_TYPE)
        np.save(temporary, np.concatenate([none, *(m.astype(ROW_TYPE) for m in matrices)]))
    return [f"{first}:{last}" for first, last in itertools.pairwise(ends)]


def is_whole(path: Path) -> bool:
    """Whether a shard is there and has all the bytes that its header promises."""
    try:
        begin, rows = _read_header(path)
        return path.stat().st_size == begin + rows * ROW_BYTES
    except (OSError, ValueError):
        return False


def _read_header(path: Path) -> tuple[int, int]:
    """At which byte a shard's rows begin, and how many there are."""
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"a .npy of version {version} is not a shard of features")
        shape, in_columns, row_type = np.lib.format.read_array_header_1_0(file)
        if shape[1:] != (NUM_BINS,) or in_columns or row_type != ROW_TYPE:
            raise ValueError(f"an array {shape} of {row_type} is not a shard of features")
        return file.tell(), shape[0]


@functools.lru_cache(maxsize=100_000)
def _rows_begin(path: str) -> int:
    return _read_header(Path(path))[0]


@register_reader
class ShardReader(FeaturesReader):  # type: ignore[misc]  # lhotse is untyped
    """Reads a cut's rows from a shard; the key is "first:last"."""

    name = "icetransfer-shard"

    def __init__(self, storage_path: str) -> None:
        self.storage_path = str(storage_path)

    def read(
        self, key: str, left_offset_frames: int = 0, right_offset_frames: int | None = None
    ) -> NDArray[np.float32]:
        """Frames (T, 80) of the cut stored under `key`, or a part of them.

        Raises:
            OSError: there is no such file, or it cannot be read.
            ValueError: the file is no shard, or is cut short.
        """
        first, last = (int(row) for row in key.split(":"))
        wanted = range(first, last)[left_offset_frames:right_offset_frames]
        start = _rows_begin(self.storage_path) + wanted.start * ROW_BYTES
        with Path(self.storage_path).open("rb", buffering=0) as file:
            content = os.pread(file.fileno(), len(wanted) * ROW_BYTES, start)
            size = file.seek(0, os.SEEK_END)
        if len(content) < len(wanted) * ROW_BYTES:
            raise ValueError(
                f"it is cut short: its rows {wanted.start} to {wanted.stop} end at byte "
                f"{start + len(wanted) * ROW_BYTES}, and it has {size} bytes"
            )
        rows = np.frombuffer(content, ROW_TYPE).reshape(-1, NUM_BINS)
        return rows.astype(np.float32)
