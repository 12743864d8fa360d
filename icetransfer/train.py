"""Stage 6: multi-latency fine-tuning -> exp/checkpoints.

Each batch is trained at one chunk size and left context, drawn from the config's lists.  All that
is random in a step is a function of the seed and the step's number (the batch, the tier,
SpecAugment, dropout), so a run that was killed and resumed equals the undisturbed one, and runs
from EN and ML see the same batches at the same tiers with the same masks.
"""

import json
import random
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icetransfer.average import StateDict, start_average, update_averaged_model
from icetransfer.checkpoint import read_checkpoint, save_checkpoint
from icetransfer.config import Train
from icetransfer.data.augment import augment, make_transform
from icetransfer.data.loader import Batch, TrainLoader, dev_batches, dev_cuts, train_cuts
from icetransfer.data.tokenizer import Tokenizer
from icetransfer.experiment import (
    Experiment,
    log,
    run_stage,
    seed_everything,
    sha256,
    write_provenance,
)
from icetransfer.loss import TransducerLosses, loss_backend, loss_scales, transducer_loss
from icetransfer.model.scaling import set_batch_count
from icetransfer.model.transducer import TransducerModel, build_transducer
from icetransfer.optim import Cooldown, Eden, ScaledAdam

DEV_SECONDS = 600  # dev audio at most, the same recordings each time
# The regularisers' schedules count batches of full-size training.  A run from scratch, however
# short, goes through them in its first tenth; one from trained weights begins at their end.
SCHEDULED_BATCHES = 20_000
SCHEDULED_FRACTION = 0.1
TRAINED_BATCHES = 100_000
LOSSES = ("loss", "simple_loss", "pruned_loss", "ctc_loss")


@dataclass
class Run:
    """What changes from step to step, and what the steps need."""

    experiment: Experiment
    model: TransducerModel
    averaged: StateDict
    optimizer: ScaledAdam
    scheduler: Cooldown | Eden
    loader: TrainLoader
    device: torch.device
    step: int = 0

    @property
    def settings(self) -> Train:
        """The config's train section."""
        return self.experiment.config.train

    @property
    def seed(self) -> int:
        """The experiment's seed."""
        return self.experiment.config.seed


@dataclass
class Meter:
    """Losses of the steps since the last report, left on the device until they are asked for."""

    steps: list[tuple[int, tuple[str, ...], Tensor]] = field(default_factory=list)
    audio_seconds: float = 0.0
    since: float = field(default_factory=time.perf_counter)

    def add(self, step: int, batch: Batch, sums: Tensor) -> None:
        """Takes a step's summed losses and frames, (len(LOSSES) + 1,)."""
        self.steps.append((step, batch.ids, sums))
        self.audio_seconds += batch.seconds

    def check(self) -> None:
        """Looks for losses that are not finite.

        Raises:
            ValueError: there is one; its step and cuts are named.
        """
        if not self.steps:
            return
        finite = torch.stack([sums for _, _, sums in self.steps]).isfinite().all(dim=1).tolist()
        if not all(finite):
            step, ids, _ = self.steps[finite.index(False)]
            raise ValueError(
                f"the loss is not finite at step {step}, on the batch of the cuts "
                f"{', '.join(ids)}: look at these recordings, or lower train.lr; the checkpoints "
                f"are from before"
            )

    def means(self) -> dict[str, float]:
        """Mean losses for each encoder frame (40 ms), and audio seconds per second; starts anew."""
        self.check()
        sums = torch.stack([sums for _, _, sums in self.steps]).sum(dim=0).tolist()
        elapsed = time.perf_counter() - self.since
        means = per_frame(sums) | {"audio_per_second": self.audio_seconds / elapsed}
        self.steps, self.audio_seconds, self.since = [], 0.0, time.perf_counter()
        return means


class Reporter:
    """Sends numbers to metrics.jsonl and TensorBoard, and shows where the run is."""

    def __init__(self, run: Run) -> None:
        """Continues the files of a resumed run from its step."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from torch.utils.tensorboard import SummaryWriter

        folder = run.experiment.dir
        self._metrics = _open_metrics(folder / "metrics.jsonl", run.step)
        self._board = SummaryWriter(folder / "tensorboard", purge_step=run.step + 1)
        self._total = run.settings.max_steps
        self._first, self._start = run.step, time.perf_counter()
        self._dev = ""
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.fields[now]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=self._total, completed=run.step, now="")
        self._bar.start()

    def progress(self, step: int) -> None:
        """Moves the bar."""
        self._bar.update(self._task, completed=step)

    def report(self, step: int, numbers: dict[str, float], kind: str) -> None:
        """Writes the numbers of a step; `kind` is train or dev."""
        self._metrics.write(json.dumps({"step": step, "kind": kind, **numbers}) + "\n")
        self._metrics.flush()
        for name, value in numbers.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)
        if kind == "dev":
            self._dev = f", dev loss {numbers['loss']:.4f}"
            if self._bar.disable:
                log.info("step %d/%d%s", step, self._total, self._dev)
            return
        pace = (time.perf_counter() - self._start) / max(step - self._first, 1)
        left = int(pace * (self._total - step))
        text = (
            f"loss {numbers['loss']:.4f}{self._dev}, lr {numbers['lr']:.4f}, "
            f"{numbers['audio_per_second']:.0f} s of audio/s, {left // 60}:{left % 60:02d} left"
        )
        if self._bar.disable:
            log.info("step %d/%d: %s", step, self._total, text)
        else:
            self._bar.update(self._task, now=text)

    def close(self) -> None:
        """Flushes the files and takes the bar away."""
        self._bar.stop()
        self._board.close()
        self._metrics.close()


def _open_metrics(path: Path, step: int) -> Any:
    """Opens metrics.jsonl to append, without what a killed run wrote after its checkpoint."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    whole = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    path.write_text("".join(line + "\n" for line in whole), encoding="utf-8")
    return path.open("a", encoding="utf-8")


def per_frame(sums: Iterable[float]) -> dict[str, float]:
    """Names and normalises summed losses; the last of `sums` is the encoder frames."""
    *losses, frames = sums
    return {name: value / frames for name, value in zip(LOSSES, losses, strict=True)}


def draw_tier(settings: Train, seed: int, step: int) -> tuple[int, int]:
    """Chunk size and left context (50 Hz frames) of a step; offline has all the left context."""
    draw = random.Random(f"tier {seed} {step}")
    chunk_size = draw.choice(settings.chunk_sizes)
    left = draw.choice(settings.left_context_frames)
    return chunk_size, -1 if chunk_size == -1 else left


def dev_tier(settings: Train) -> tuple[int, int]:
    """The tier of the dev loss: the longest chunk and left context that stream."""
    chunk_size = max(settings.chunk_sizes)
    return chunk_size, -1 if chunk_size == -1 else max(settings.left_context_frames)


def schedule_count(settings: Train, step: int, from_scratch: bool) -> float:
    """Where the regularisers' schedules are at a step."""
    if not from_scratch:
        return TRAINED_BATCHES
    return SCHEDULED_BATCHES * step / (SCHEDULED_FRACTION * settings.max_steps)


def average_period(settings: Train) -> int:
    """Steps between updates of the running average; a very short run still has ten of them."""
    return min(settings.average_period, max(1, settings.max_steps // 10))


def average_start(settings: Train) -> int:
    """The step after which the final average begins, on an update of the running average."""
    period = average_period(settings)
    return int(settings.max_steps * (1 - settings.average_fraction)) // period * period


def surplus(steps: Iterable[int], keep: int, start: int) -> list[int]:
    """The checkpoints to delete: all but the last `keep` and the one nearest to `start`."""
    ordered = sorted(steps)
    kept = {*ordered[-keep:], min(ordered, key=lambda step: abs(step - start))}
    return [step for step in ordered if step not in kept]


def train(experiment: Experiment) -> None:
    """Trains from init.pt, or goes on from the last checkpoint, to the last step.

    Raises:
        ValueError: data or init.pt are missing, or the loss is not finite.
    """
    settings = experiment.config.train
    last = _checkpoint_path(experiment, settings.max_steps)
    if last.is_file():
        log.info("skip: %s is complete", last)
        return
    torch.set_num_threads(settings.threads)
    started = time.time()
    run = start_run(experiment)
    tokenizer = Tokenizer(experiment.lang_dir / "bpe.model")
    dev = dev_batches(dev_cuts(experiment, DEV_SECONDS), tokenizer, settings.batch_seconds)
    first = run.step
    if first:
        log.info("going on from step %d", first)
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    backend = loss_backend(settings.loss_backend)
    log.info(
        "%d parameters, %.1f minutes of audio at all speeds, %s, %d threads, loss by %s",
        parameters, run.loader.seconds / 60, run.device, settings.threads, backend,
    )  # fmt: skip
    reporter = Reporter(run)
    try:
        _train_loop(run, dev, reporter)
    finally:
        reporter.close()
    write_provenance(
        experiment,
        "train",
        steps=[first, run.step],
        seconds=round(time.time() - started, 1),
        device=str(run.device),
        loss_backend=backend,
        checkpoint_sha256=sha256(last),
    )


def start_run(experiment: Experiment) -> Run:
    """The run at its last checkpoint, or at init.pt when there is none."""
    config = experiment.config
    done = _saved_steps(experiment)
    path = _checkpoint_path(experiment, done[-1]) if done else experiment.init_checkpoint
    if not path.is_file():
        raise ValueError(f"{path} does not exist: run stage 5, which makes it")
    dims, weights, extra = read_checkpoint(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_transducer(dims)
    model.load_state_dict(weights)
    model.to(device)
    tokenizer = Tokenizer(experiment.lang_dir / "bpe.model")
    if tokenizer.vocab_size != dims.vocab_size:
        raise ValueError(
            f"{path} has {dims.vocab_size} tokens, {experiment.lang_dir / 'bpe.model'} has "
            f"{tokenizer.vocab_size}: remove the experiment's init.pt and run stage 5 again"
        )
    settings = config.train
    optimizer = ScaledAdam(
        model.named_parameters(), lr=settings.lr, clipping_scale=settings.clipping_scale
    )
    loader = TrainLoader(train_cuts(experiment), tokenizer, settings.batch_seconds, config.seed)
    run = Run(
        experiment=experiment,
        model=model,
        averaged=start_average(model),
        optimizer=optimizer,
        scheduler=_make_scheduler(optimizer, settings),
        loader=loader,
        device=device,
    )
    if done:
        run.step = extra["batch_idx_train"]
        run.averaged = {name: value.to(device) for name, value in extra["model_avg"].items()}
        run.optimizer.load_state_dict(extra["optimizer"])
        run.scheduler.load_state_dict(extra["scheduler"])
        run.loader.load_state_dict(extra["sampler"])
    return run


def _make_scheduler(optimizer: ScaledAdam, settings: Train) -> Cooldown | Eden:
    schedule = settings.schedule
    if schedule.kind == "eden":
        return Eden(
            optimizer,
            schedule.eden_batches,
            schedule.eden_epochs,
            warmup_batches=schedule.warmup_steps,
        )
    return Cooldown(
        optimizer,
        settings.max_steps,
        warmup_batches=schedule.warmup_steps,
        cooldown=schedule.cooldown_fraction,
    )


def _train_loop(run: Run, dev: list[Batch], reporter: Reporter) -> None:
    settings = run.settings
    transform = make_transform(settings.spec_augment)
    start = average_start(settings)
    meter = Meter()
    run.model.train()
    for batch in run.loader:
        run.step += 1
        seed_everything(_step_seed(run.seed, run.step))
        on_device = batch.to(run.device)
        features = augment(transform, on_device.features, batch.feature_lens)
        meter.add(run.step, batch, _train_step(run, on_device, features, meter))
        update_averaged_model(run.step, average_period(settings), run.model, run.averaged)
        reporter.progress(run.step)

        finished = run.step == settings.max_steps
        if finished or run.step % settings.log_every == 0:
            rate = {"lr": run.optimizer.param_groups[0]["lr"], "epoch": run.loader.epoch}
            reporter.report(run.step, meter.means() | rate, "train")
        if finished or run.step % settings.valid_every == 0:
            reporter.report(run.step, dev_loss(run, dev), "dev")
        if finished or run.step % settings.checkpoint_every == 0 or run.step == start:
            meter.check()
            _save(run, start)
        if finished:
            return


def _train_step(run: Run, batch: Batch, features: Tensor, meter: Meter) -> Tensor:
    """One update of the weights.

    Returns:
        The batch's summed losses in the order of LOSSES, and its encoder frames.
    """
    settings, step = run.settings, run.step
    from_scratch = run.experiment.config.init == "random"
    set_batch_count(run.model, schedule_count(settings, step, from_scratch))
    run.scheduler.step_epoch(run.loader.epoch)
    run.scheduler.step_batch(step)
    chunk_size, left = draw_tier(settings, run.seed, step)
    losses, frames = _losses(run, batch, features, chunk_size, left)
    simple, pruned = loss_scales(step, settings.loss_warmup_steps, settings.simple_loss_scale)
    total = losses.total(simple, pruned, settings.ctc_loss_scale)
    run.optimizer.zero_grad(set_to_none=True)
    total.backward()  # type: ignore[no-untyped-call]
    sums = _sums(total, losses, frames)
    try:
        run.optimizer.step()
    except FloatingPointError as error:
        meter.add(step, batch, sums)
        meter.check()
        raise ValueError(f"step {step}: {error}") from None
    return sums


def _losses(
    run: Run, batch: Batch, features: Tensor, chunk_size: int, left: int
) -> tuple[TransducerLosses, Tensor]:
    """Losses of a batch at a tier, and its encoder frames."""
    out, out_lens = run.model.encode(features, batch.feature_lens, chunk_size, left)
    losses = transducer_loss(
        run.model,
        out,
        out_lens,
        batch.tokens,
        batch.token_lens,
        prune_range=run.settings.prune_range,
        backend=run.settings.loss_backend,
    )
    return losses, out_lens.sum()


def _sums(total: Tensor, losses: TransducerLosses, frames: Tensor) -> Tensor:
    ctc = torch.zeros_like(total) if losses.ctc is None else losses.ctc
    parts = (total, losses.simple, losses.pruned, ctc, frames.to(total))
    return torch.stack([part.detach() for part in parts])


@torch.no_grad()
def dev_loss(run: Run, dev: list[Batch]) -> dict[str, float]:
    """Mean losses for each encoder frame of the dev batches, at one tier."""
    settings = run.settings
    run.model.eval()
    sums = []
    for batch in dev:
        on_device = batch.to(run.device)
        losses, frames = _losses(run, on_device, on_device.features, *dev_tier(settings))
        total = losses.total(settings.simple_loss_scale, 1.0, settings.ctc_loss_scale)
        sums.append(_sums(total, losses, frames))
    run.model.train()
    return per_frame(torch.stack(sums).sum(dim=0).tolist())


def _step_seed(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step) % 2**32


def _save(run: Run, start: int) -> None:
    """Writes the checkpoint of the run's step, then deletes those that are not needed any more."""
    save_checkpoint(
        _checkpoint_path(run.experiment, run.step),
        run.model,
        model_avg=run.averaged,
        optimizer=run.optimizer.state_dict(),
        scheduler=run.scheduler.state_dict(),
        sampler=run.loader.state_dict(),
        batch_idx_train=run.step,
        average_period=average_period(run.settings),
    )
    for step in surplus(_saved_steps(run.experiment), run.settings.keep_checkpoints, start):
        _checkpoint_path(run.experiment, step).unlink()


def _checkpoint_path(experiment: Experiment, step: int) -> Path:
    return experiment.checkpoints_dir / f"checkpoint-{step}.pt"


def _saved_steps(experiment: Experiment) -> list[int]:
    names = (path.name for path in experiment.checkpoints_dir.glob("checkpoint-*.pt"))
    return sorted(int(m[1]) for name in names if (m := re.fullmatch(r"checkpoint-(\d+)\.pt", name)))


if __name__ == "__main__":
    run_stage(__doc__, train)
