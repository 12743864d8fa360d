"""What can go wrong in a long run, and what training makes of it.

Signals become a wish to stop, batches with numbers that are not finite are counted, and returns to
an earlier checkpoint are kept in a file, because they decide the learning rate of what follows.
"""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch

from icetransfer.stage import atomic
from icetransfer.stage.json_file import read_json

# Ctrl-C, and what Slurm sends before the time is up.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

BAD_RUN = 10  # so many bad batches in a row, and training goes back
MAX_RETURNS = 3
RATE_FACTOR = 0.5  # on the learning rate, at each return


class StopSignals:
    """Within the block, SIGINT, SIGTERM and SIGUSR1 do not end the process but are remembered.

    A second Ctrl-C ends it at once.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._interrupts = 0

    def __enter__(self) -> "StopSignals":
        """Takes the signals over."""
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Gives them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts == 2:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)


@contextmanager
def naming_lost_workers() -> Iterator[None]:
    """Within the block, the death of a process that loads data is an error that says so.

    Raises:
        OSError: a process that loads data died.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise OSError(
            f"a process that loads data died ({str(error).splitlines()[0]}): the machine may be "
            f"out of memory, then lower train.workers. Run again: training goes on from its last "
            f"checkpoint"
        ) from error


@dataclass
class BadBatches:
    """Counts the batches that were skipped because a loss or gradient was not finite.

    Attributes:
        total: in the whole run.
        in_a_row: the last ones of it.
        since: the step of the first of these.
        missing_cuts: cuts of other batches whose features could not be read, in the whole run.
    """

    total: int = 0
    in_a_row: int = 0
    since: int = 0
    missing_cuts: int = 0

    def count(self, step: int, good: bool) -> None:
        """Takes the next step in."""
        if good:
            self.in_a_row = 0
            return
        self.total += 1
        self.in_a_row += 1
        if self.in_a_row == 1:
            self.since = step


class BadRun(Exception):  # noqa: N818 - it is no error until it has come too often
    """A run of bad batches: training is to go back.

    Attributes:
        since: the step of the first of them.
        seen: the reason, then a line for each of the last bad batches.
    """

    def __init__(self, reason: str, since: int, seen: list[str]) -> None:
        super().__init__(reason)
        self.since = since
        self.seen = [reason, *seen]


@dataclass(frozen=True)
class Return:
    """One return to an earlier checkpoint.

    Attributes:
        since: the step at which the bad batches began.
        to: the step of the checkpoint, 0 for the start.
        seen: the reason, then a line for each of the last bad batches.
    """

    since: int
    to: int
    seen: list[str]


def read_returns(path: Path) -> list[Return]:
    """The returns of a run so far; none when there is no file."""
    if not path.is_file():
        return []
    return [Return(**entry) for entry in read_json(path)]


def write_returns(path: Path, returns: list[Return]) -> None:
    """Writes what `read_returns` reads."""
    atomic.write_text(path, json.dumps([asdict(entry) for entry in returns], indent=1) + "\n")


def describe_end(path: Path, returns: list[Return], last: BadRun) -> str:
    """What was seen in all, for the error that ends a run after too many returns."""
    lines = [
        f"training stops: losses or gradients are not finite for the {len(returns) + 1}th time, "
        f"now at {RATE_FACTOR ** len(returns):g} times the learning rate"
    ]
    for entry in [*returns, Return(last.since, -1, last.seen)]:
        went = f", went back to step {entry.to}" if entry.to >= 0 else ""
        lines += [f"from step {entry.since}{went}:", *(f"  {line}" for line in entry.seen)]
    lines.append(
        f"the checkpoints from before are whole. Look at these recordings and at train.lr; to try "
        f"again as it is, remove {path}"
    )
    return "\n".join(lines)


# cuDNN has no code of its own for a workspace that it could not have.
OUT_OF_MEMORY = (
    *("DefaultCPUAllocator", "not enough memory", "out of memory", "Cannot allocate memory"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUFFT_ALLOC_FAILED"),
    *("CUDNN_STATUS_INTERNAL_ERROR", "ALLOCATION_FAILED", "std::bad_alloc"),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that the memory of a GPU or of the machine did not suffice."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in OUT_OF_MEMORY)
