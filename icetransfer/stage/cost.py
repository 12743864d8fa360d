"""What a stage cost: wall time, device hours, and energy where the GPU counts it.

Every stage adds a line to its experiment's `log/cost.jsonl`, also one that fails or is stopped; one
that is killed outright does not.  The report sums them up.
"""

import ctypes
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from icetransfer.stage.lines import append_line, read_lines

JOULES_PER_KWH = 3.6e6


class EnergyCounters:
    """The energy counters of the visible GPUs of this node, through NVIDIA's NVML.

    NVML is a part of the driver.  Without it, or on a GPU that does not count, there are none.
    """

    def __init__(self, library: str = "libnvidia-ml.so.1") -> None:
        self._handles: list[ctypes.c_void_p] = []
        try:
            self._nvml = ctypes.CDLL(library)
        except OSError:
            return
        if self._nvml.nvmlInit_v2() == 0:
            self._handles = [handle for name in self._visible() if (handle := self._find(name))]

    def _visible(self) -> list[str]:
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        if named is not None:
            return [name for name in named.split(",") if name]
        count = ctypes.c_uint()
        self._nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        return [str(index) for index in range(count.value)]

    def _find(self, name: str) -> ctypes.c_void_p | None:
        handle = ctypes.c_void_p()
        if name.isdecimal():
            code = self._nvml.nvmlDeviceGetHandleByIndex_v2(int(name), ctypes.byref(handle))
        else:
            code = self._nvml.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle))
        return handle if code == 0 else None

    def joules(self) -> float | None:
        """Joules since the driver was loaded, over all GPUs; None where none counts."""
        total, counted = 0, False
        for handle in self._handles:
            millijoules = ctypes.c_ulonglong()
            if self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)):
                continue
            total, counted = total + millijoules.value, True
        return total / 1000 if counted else None


def is_first_process() -> bool:
    """Whether this is the only process of a command, or the first of those that train together."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0


@contextmanager
def measured(path: Path, stage: str) -> Iterator[None]:
    """Adds what the block costs to a file; of several processes the first does, for all of them.

    Args:
        path: the experiment's `log/cost.jsonl`.
        stage: the module's name, as train.
    """
    if not is_first_process():
        yield
        return
    counters = EnergyCounters()
    begun, start, before = time.time(), time.monotonic(), counters.joules()
    try:
        yield
    finally:
        seconds = time.monotonic() - start  # the wall clock may be set meanwhile
        entry = {"stage": stage, "time": round(begun), "wall_seconds": round(seconds, 2)}
        entry |= {"device": "cpu", "devices": int(os.environ.get("WORLD_SIZE", 1))}
        if _uses_gpu():
            entry["device"] = sys.modules["torch"].cuda.get_device_name()
            after = counters.joules()
            if before is not None and after is not None:
                # of this node's GPUs; the other nodes have as many, and do the same
                nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))
                entry["joules"] = round((after - before) * nodes)
        append_line(path, entry)


def _uses_gpu() -> bool:
    torch = sys.modules.get("torch")
    return bool(torch and torch.cuda.is_available() and torch.cuda.is_initialized())


def read_costs(path: Path) -> dict[str, dict[str, Any]]:
    """Sums of what every stage of an experiment has cost, over all its runs.

    Returns:
        By stage: runs, wall_hours, device, device_hours, and kwh (None where it was not counted).
    """
    stages: dict[str, dict[str, Any]] = {}
    for entry in read_lines(path, ("stage", "wall_seconds", "devices", "device")):
        new = {"runs": 0, "wall_hours": 0.0, "device_hours": 0.0, "kwh": None}
        own = stages.setdefault(entry["stage"], new)
        hours = entry["wall_seconds"] / 3600
        own["runs"] += 1
        own["wall_hours"] += hours
        own["device_hours"] += hours * entry["devices"]
        own["device"] = entry["device"]
        if "joules" in entry:
            own["kwh"] = (own["kwh"] or 0.0) + entry["joules"] / JOULES_PER_KWH
    return stages
