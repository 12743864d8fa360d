"""One process at a time in a folder, or several that share its work: who has it, and who waits."""

import fcntl
import json
import logging
import os
import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from icetransfer.stage.cost import is_first_process

LOCK = ".lock"

log = logging.getLogger("icetransfer")


@contextmanager
def locked(folder: Path, stage: str, waits: bool, shares: bool = False) -> Iterator[None]:
    """Holds a folder's lock; of several processes of one training, the first does for all.

    The lock is the kernel's (flock, which Linux passes on over NFS), so it ends with the process,
    however that ends.  What stands in the file is for people.

    Args:
        folder: made if it is not there.
        stage: who asks.
        waits: whether to wait for whoever has it, or to leave it to them.
        shares: whether others that share may have it at the same time.

    Raises:
        ValueError: another process has it, and this one does not wait.
    """
    if not is_first_process():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    kind = fcntl.LOCK_SH if shares else fcntl.LOCK_EX
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(folder / LOCK)
            if not waits:
                raise ValueError(
                    f"{folder} is in use by {holder}: wait until that is done, or end it; for a "
                    f"run of its own, use another --exp"
                ) from None
            log.info("%s: waiting for %s, which works in %s", stage, holder, folder)
            fcntl.flock(file, kind)
        file.truncate(0)
        record = {"stage": stage, "host": socket.gethostname(), "pid": os.getpid()}
        record["since"] = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(json.dumps(record))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


@contextmanager
def claimed(result: Path) -> Iterator[None]:
    """Holds one of the files that processes make side by side, after whoever is making it.

    The lock is the kernel's, on one byte of the folder's lock file.  Two names that meet in a byte
    wait for each other, which does no harm: a process holds one at a time.
    """
    result.parent.mkdir(parents=True, exist_ok=True)
    with (result.parent / LOCK).open("ab") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 1, zlib.crc32(result.name.encode()))
        yield


def _holder(path: Path) -> str:
    """Who wrote into a lock, for people."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return "{stage} on {host} (process {pid}, since {since})".format(**found)
    except (OSError, ValueError, KeyError):
        return "another process"
