"""Runs a command and ends it, with all that it started, when the caller dies, however it dies.

    python guard.py FD COMMAND...

FD is a pipe's reading end whose other end the caller alone has open: it closes when he is gone.
The caller makes this the leader of a session.  A signal to the session reaches the command, whose
exit code is returned.  Run as a script, for a start in some ten milliseconds.
"""

import os
import signal
import subprocess
import sys
import threading
import time

GRACE = 20  # seconds to save


def guard(pipe: int, command: list[str]) -> int:
    """Runs the command to its end, or to the caller's.

    Returns:
        Its exit code, or as in a shell 128 and the signal that ended it.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)  # the command hears it too, and decides
    process = subprocess.Popen(command, close_fds=False)  # the locks go with it
    orphaned = threading.Event()

    def watch() -> None:
        os.read(pipe, 1)
        orphaned.set()
        os.killpg(0, signal.SIGTERM)
        time.sleep(GRACE)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    code = process.wait()
    if orphaned.is_set():
        os.killpg(0, signal.SIGKILL)  # what the command has left behind
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(guard(int(sys.argv[1]), sys.argv[2:]))
