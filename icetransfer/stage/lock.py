"""One process at a time in a folder: who has it, and who waits."""

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from icetransfer.stage.cost import is_first_process

LOCK = ".lock"

log = logging.getLogger("icetransfer")


@contextmanager
def locked(folder: Path, stage: str, waits: bool) -> Iterator[None]:
    """Holds a folder's lock; of several processes of one training, the first does for all.

    The lock is the kernel's (flock, which Linux passes on over NFS), so it ends with the process,
    however that ends.  What stands in the file is for people.

    Args:
        folder: made if it is not there.
        stage: who asks.
        waits: whether to wait for whoever has it, or to leave it to them.

    Raises:
        ValueError: another process has it, and this one does not wait.
    """
    if not is_first_process():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(folder / LOCK)
            if not waits:
                raise ValueError(
                    f"{folder} is in use by {holder}: wait until that is done, or end it; for a "
                    f"run of its own, use another --exp"
                ) from None
            log.info("%s: waiting for %s, which works in %s", stage, holder, folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        record = {"stage": stage, "host": socket.gethostname(), "pid": os.getpid()}
        record["since"] = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(json.dumps(record))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _holder(path: Path) -> str:
    """Who wrote into a lock, for people."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return "{stage} on {host} (process {pid}, since {since})".format(**found)
    except (OSError, ValueError, KeyError):
        return "another process"
