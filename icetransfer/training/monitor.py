"""What can be watched of a run: its losses, metrics.jsonl, TensorBoard and a progress bar."""

import json
import math
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from icetransfer.data.loader import Batch
from icetransfer.experiment import log
from icetransfer.stage import atomic
from icetransfer.stage.lines import append_line, read_lines
from icetransfer.training.distributed import World
from icetransfer.training.faults import BadBatches

LOSSES = ("loss", "simple_loss", "pruned_loss", "ctc_loss")


@dataclass
class Meter:
    """Numbers of the steps since the last report.

    They are left on the device until `look` is called, so that no step waits for them.

    Attributes:
        bad: the count of skipped steps, which `look` carries on.
        world: the processes; all of them must call `look` and `means` at the same steps.
        seen: a line for each of the last bad steps in a row.
    """

    bad: BadBatches
    world: World = field(default_factory=World)
    seen: list[str] = field(default_factory=list)
    _new: list[tuple[int, tuple[str, ...], Tensor]] = field(default_factory=list)
    _good: list[list[float]] = field(default_factory=list)
    _missing: list[tuple[str, str]] = field(default_factory=list)
    _audio_seconds: float = 0.0
    _tokens: float = 0.0
    _frames: float = 0.0
    _padded_frames: float = 0.0
    _since: float = field(default_factory=time.perf_counter)

    def add(self, step: int, batches: Iterable[Batch], numbers: Tensor) -> None:
        """Takes a step in.

        Args:
            step: its number.
            batches: what it was made on, here, as they are on the host.
            numbers: (len(LOSSES) + 2,), the losses and encoder frames summed over all processes,
                and the norm of the gradient.
        """
        ids: tuple[str, ...] = ()
        for batch in batches:
            ids += batch.ids
            self._missing += batch.missing
            self._audio_seconds += batch.seconds
            self._tokens += batch.token_lens.numpy().sum()  # of the batch on the host
            self._frames += batch.feature_lens.numpy().sum()
            self._padded_frames += batch.features.shape[0] * batch.features.shape[1]
        self._new.append((step, ids, numbers))

    def look(self) -> None:
        """Brings the numbers to the host; logs and counts skipped steps and missing cuts."""
        if not self._new:
            return
        rows = torch.stack([numbers for _, _, numbers in self._new]).tolist()
        for (step, ids, _), row in zip(self._new, rows, strict=True):
            good = all(map(math.isfinite, row))
            self.bad.count(step, good)
            if good:
                self._good.append(row)
                self.seen = []
                continue
            ids = tuple(name for own in self.world.gather(ids) for name in own)
            line = (
                f"step {step}: loss {row[0]:g}, gradient norm {row[-1]:g}; batch skipped, its "
                f"cuts: {', '.join(ids)}"
            )
            self.seen.append(line)
            log.warning("%s", line)
        for name, reason in [each for own in self.world.gather(self._missing) for each in own]:
            self.bad.missing_cuts += 1
            log.warning("left out %s: %s", name, reason)
        self._new, self._missing = [], []

    def means(self) -> dict[str, float]:
        """Means since the last call, losses for each encoder frame (40 ms); starts anew.

        Without a good step since then there are no losses among them.
        """
        self.look()
        elapsed = time.perf_counter() - self._since
        means: dict[str, float] = {}
        if self._good:
            *sums, norms = (math.fsum(column) for column in zip(*self._good, strict=True))
            means = per_frame(sums) | {"gradient_norm": norms / len(self._good)}
        here = [self._audio_seconds, self._tokens, self._frames, self._padded_frames]
        seconds, tokens, frames, padded_frames = self.world.sum(torch.tensor(here)).tolist()
        means |= {
            "audio_per_second": seconds / elapsed,
            "tokens_per_second": tokens / elapsed,
            "padding": 1 - frames / max(padded_frames, 1),
            "skipped_batches": self.bad.total,
            "missing_cuts": self.bad.missing_cuts,
        }
        self._good, self._since = [], time.perf_counter()
        self._audio_seconds = self._tokens = self._frames = self._padded_frames = 0.0
        return means


def per_frame(sums: Iterable[float]) -> dict[str, float]:
    """Names and normalises summed losses; the last of `sums` is the encoder frames, maybe 0."""
    *losses, frames = sums
    return {name: value / max(frames, 1) for name, value in zip(LOSSES, losses, strict=True)}


class Reporter:
    """Sends numbers to metrics.jsonl and TensorBoard, and shows where the run is."""

    def __init__(self, folder: Path, step: int, max_steps: int) -> None:
        """Continues the files of a run from a step.

        Args:
            folder: the experiment's.
            step: the last one done; what the files hold of later ones is dropped.
            max_steps: of the whole run.
        """
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from torch.utils.tensorboard import SummaryWriter

        self._metrics = folder / "metrics.jsonl"
        self._other_errors, threading.excepthook = threading.excepthook, self._error_of_a_thread
        self._board: SummaryWriter | None = None
        with self._going_on_without("metrics.jsonl"):
            _drop_later(self._metrics, step)
        with self._going_on_without("tensorboard"):
            self._board = SummaryWriter(folder / "tensorboard", purge_step=step + 1)
        self._total = max_steps
        self._first, self._start = step, time.perf_counter()
        self._dev = ""
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.fields[now]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=self._total, completed=step, now="")
        self._bar.start()

    def progress(self, step: int) -> None:
        """Moves the bar."""
        self._bar.update(self._task, completed=step)

    def report(self, step: int, numbers: dict[str, float], kind: str) -> None:
        """Writes the numbers of a step; `kind` is train or dev."""
        append_line(self._metrics, {"step": step, "kind": kind, **numbers})
        if self._board:
            board, self._board = self._board, None  # once it fails, it does so for good
            with self._going_on_without("tensorboard"):
                for name, value in numbers.items():
                    board.add_scalar(f"{kind}/{name}", value, step)
                self._board = board
        loss = numbers.get("loss", math.nan)
        if kind == "dev":
            self._dev = f", dev loss {loss:.4f}"
            if self._bar.disable:
                log.info("step %d/%d%s", step, self._total, self._dev)
            return
        pace = (time.perf_counter() - self._start) / max(step - self._first, 1)
        left = int(pace * (self._total - step))
        text = (
            f"loss {loss:.4f}{self._dev}, lr {numbers['lr']:.4f}, "
            f"{numbers['audio_per_second']:.0f} s of audio/s, {left // 60}:{left % 60:02d} left"
        )
        if self._bar.disable:
            log.info("step %d/%d: %s", step, self._total, text)
        else:
            self._bar.update(self._task, now=text)

    def close(self) -> None:
        """Flushes the files and takes the bar away."""
        self._bar.stop()
        if self._board:
            with self._going_on_without("tensorboard"):
                self._board.close()
        threading.excepthook = self._other_errors

    def _error_of_a_thread(self, error: threading.ExceptHookArgs) -> None:
        """Leaves out the traceback of TensorBoard's writer, whose error the next call raises."""
        is_writers = type(error.thread).__module__.startswith("tensorboard.")
        if not (is_writers and isinstance(error.exc_value, OSError)):
            self._other_errors(error)

    @contextmanager
    def _going_on_without(self, name: str) -> Iterator[None]:
        """Warns of what cannot be written, on a full disk, and goes on."""
        try:
            yield
        except OSError as error:
            path = self._metrics.with_name(name)
            log.warning("%s is not written any more (%s)", path, error.strerror or error)


def _drop_later(path: Path, step: int) -> None:
    """Takes out of metrics.jsonl what a killed run wrote after its checkpoint."""
    kept = [line for line in read_lines(path, ("step", "kind")) if line["step"] <= step]
    atomic.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
