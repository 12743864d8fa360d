"""Warm-start transfer of streaming speech recognisers: English-only or multilingual?

The names below are the public interface.  They are imported when they are first asked for, so
that `import icetransfer` alone loads no torch.
"""

import os
import signal
import sys


def _end_in_one_line(kind: type[BaseException], error: BaseException, trace: object) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr, flush=True)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)  # so that a shell knows why it ended
    else:
        sys.__excepthook__(kind, error, trace)  # type: ignore[arg-type]


if sys.argv[:1] == ["-m"]:  # of `python -m icetransfer...`, before the command itself is found
    # Libraries take seconds to import, and Ctrl-C in them would show a traceback.
    sys.excepthook = _end_in_one_line

from importlib import import_module  # noqa: E402 - the hook comes before what takes time
from typing import Any  # noqa: E402

#: Stands here alone: pyproject.toml, provenance and model cards read it.
__version__ = "0.2.0"

_HOMES = {
    "Eden": "icetransfer.training.optim",
    "ScaledAdam": "icetransfer.training.optim",
    "greedy_search": "icetransfer.streaming.search",
    "load_transducer": "icetransfer.model.checkpoint",
    "modified_beam_search": "icetransfer.streaming.search",
}
_MODULES = {"rnnt": "icetransfer.training.rnnt"}

__all__ = sorted([*_HOMES, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
