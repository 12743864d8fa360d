"""Warm-start transfer of streaming speech recognisers: English-only or multilingual?

The names below are the public interface.  They are imported when they are first asked for, so
that `import icetransfer` alone loads no torch.
"""

from importlib import import_module
from typing import Any

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
