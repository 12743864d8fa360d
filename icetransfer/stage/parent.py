"""Processes that end when the one that started them is gone."""

import ctypes
import signal

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Lets the kernel send SIGTERM to this process when the one that started it is gone.

    Without it, the processes of a pool whose owner was killed wait for work for ever, and keep the
    locks that they have inherited.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # of Linux
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def work_for_parent() -> None:
    """Begins a process of a pool: it ends with its owner, and at Ctrl-C at once, silently.

    What there is to say of Ctrl-C the owner says, which the terminal interrupts too.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with_parent()
