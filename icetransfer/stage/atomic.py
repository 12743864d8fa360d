"""Files that are either whole or absent: write under a temporary name, then rename."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FullDiskError(OSError):
    """A file could not be written whole; what was there before is as it was."""

    def __init__(self, path: Path, reason: str) -> None:
        free = shutil.disk_usage(path.parent).free
        super().__init__(
            f"{path} could not be written ({reason}; {free / 1e6:.1f} MB are free in its folder); "
            f"files written before are as they were. Make room, then run the same command again"
        )


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` and renames it to `path` when the block succeeds.

    A block that fails, or a process that is killed in it, leaves `path` as it was.  The temporary
    name keeps the suffixes of `path`, because writers choose a format by them.

    Args:
        path: the file to make; its folder is made when absent.

    Yields:
        The path to write to.

    Raises:
        FullDiskError: the disk, or what the user may have of it, is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.partial.{path.name}")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise FullDiskError(path, os.strerror(error.errno)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes `text` (UTF-8) to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
