"""Stage 6: multi-latency fine-tuning -> exp/checkpoints.

Each batch is trained at one chunk size and left context, drawn from the config's lists.  All that
is random in a step is a function of the seed and the step's number (the batch, the tier,
SpecAugment, dropout), so a run that was killed and resumed equals the undisturbed one, and runs
from EN and ML see the same batches at the same tiers with the same masks.
"""

import functools
import logging
import random
import sys
import time
from dataclasses import replace

import torch
from torch import Tensor

from icetransfer.config import Train
from icetransfer.data.augment import augment, make_transform
from icetransfer.data.loader import Batch, dev_batches, dev_cuts
from icetransfer.data.tokenizer import Tokenizer
from icetransfer.experiment import (
    RUN_AGAIN,
    Experiment,
    log,
    run_stage,
    seed_everything,
    sha256,
    write_provenance,
)
from icetransfer.model.averaging import update_averaged_model
from icetransfer.model.checkpoint import Checkpoint, read_checkpoint
from icetransfer.model.scaling import set_batch_count
from icetransfer.stage import atomic
from icetransfer.training.distributed import World, join_world
from icetransfer.training.faults import BAD_RUN, BadRun, StopSignals, is_out_of_memory
from icetransfer.training.loss import TransducerLosses, loss_backend, loss_scales, transducer_loss
from icetransfer.training.monitor import LOSSES, Meter, Reporter, per_frame
from icetransfer.training.resume import (
    Run,
    average_period,
    checkpoint_path,
    go_back,
    is_regular,
    newest_checkpoint,
    run_again_path,
    save_run,
    set_frozen,
    start_run,
)
from icetransfer.training.validate import dev_wer

DEV_SECONDS = 600  # dev audio at most, the same recordings each time
# The regularisers' schedules count batches of full-size training.  A run from scratch, however
# short, goes through them in its first tenth; one from trained weights begins at their end.
SCHEDULED_BATCHES = 20_000
SCHEDULED_FRACTION = 0.1
TRAINED_BATCHES = 100_000


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


def train(experiment: Experiment) -> None:
    """Trains from init.pt, or goes on from the last checkpoint, to the last step.

    Raises:
        ValueError: data or init.pt are missing or changed, or the losses are not finite again and
            again.
        OSError: a checkpoint could not be written, or a process that loads data died.
        SystemExit: with RUN_AGAIN, after a signal and with all saved.
    """
    with join_world() as world, StopSignals() as signals:
        if not world.is_writer:
            log.setLevel(logging.ERROR)  # all of them have the same to say
        try:
            _train(experiment, world, signals)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise OSError(
                f"a process that loads data died ({str(error).splitlines()[0]}): the machine may "
                f"be out of memory, then lower train.workers. Run again: training goes on from "
                f"its last checkpoint"
            ) from error


def _train(experiment: Experiment, world: World, signals: StopSignals) -> None:
    settings = experiment.config.train
    newest = _agree_on_newest(experiment, world)
    world.as_writer(lambda: run_again_path(experiment).unlink(missing_ok=True))
    if newest and newest[0] == experiment.final_step:
        log.info("skip: %s is complete", checkpoint_path(experiment, newest[0]))
        return
    torch.set_num_threads(settings.threads)
    started = time.time()
    run = start_run(experiment, newest, world)
    tokenizer = Tokenizer(experiment.lang_dir / "bpe.model")
    dev = dev_batches(dev_cuts(experiment, DEV_SECONDS), tokenizer, settings.batch_seconds)
    first = run.step
    if first:
        log.info("going on from step %d", first)
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    backend = loss_backend(settings.loss_backend)
    log.info(
        "%d parameters, %.1f minutes of audio at all speeds, %d x %s, %s, %d threads, loss by %s",
        parameters, run.loader.seconds / 60, world.size, run.device, run.precision,
        settings.threads, backend,
    )  # fmt: skip
    while run.step < experiment.final_step and not _stops_early(run):
        try:
            _train_loop(run, dev[world.rank :: world.size], tokenizer, signals)
        except BadRun as bad:
            world.as_writer(functools.partial(go_back, experiment, bad))
            run = start_run(experiment, _agree_on_newest(experiment, world), world)
    if world.is_writer:
        write_provenance(
            experiment,
            "train",
            steps=[first, run.step],
            seconds=round(time.time() - started, 1),
            device=str(run.device),
            processes=world.size,
            precision=str(run.precision),
            loss_backend=backend,
            skipped_batches=run.bad.total,
            checkpoint_sha256=sha256(checkpoint_path(experiment, run.step)),
        )


def _agree_on_newest(experiment: Experiment, world: World) -> tuple[int, Checkpoint] | None:
    """`newest_checkpoint`, the same one in every process."""
    newest: tuple[int, Checkpoint] | None = None

    def find() -> int | None:
        nonlocal newest
        newest = newest_checkpoint(experiment)
        return newest and newest[0]

    step = world.as_writer(find)
    if world.is_writer or step is None:
        return newest
    return step, read_checkpoint(checkpoint_path(experiment, step))


def _train_loop(run: Run, dev: list[Batch], tokenizer: Tokenizer, signals: StopSignals) -> None:
    """Steps until the last one, or until the dev WER has not become better for long.

    Raises:
        BadRun: too many bad batches in a row.
        SystemExit: after a signal.
    """
    settings = run.settings
    meter = Meter(run.bad, run.world)
    run.model.train()
    reporter: Reporter | None = None

    def open_reporter() -> None:
        nonlocal reporter
        reporter = Reporter(run.experiment.dir, run.step, settings.max_steps)

    run.world.as_writer(open_reporter)
    batches = iter(run.loader)
    try:
        while True:
            shares = [next(batches) for _ in range(settings.accumulate)]
            run.step += 1
            try:
                numbers = _train_step(run, shares)
            except FloatingPointError as error:  # most of the recent gradients were bad
                meter.look()
                raise BadRun(str(error), run.bad.since, meter.seen) from None
            meter.add(run.step, shares, numbers)
            update_averaged_model(run.step, average_period(settings), run.model, run.averaged)
            if reporter:
                reporter.progress(run.step)
            _report_and_save(run, dev, tokenizer, meter, reporter)
            if run.step == settings.max_steps or _stops_early(run):
                return
            if run.world.any(signals.received is not None):
                _stop(run, meter, signals)
    finally:
        if reporter:
            reporter.close()


def _report_and_save(
    run: Run, dev: list[Batch], tokenizer: Tokenizer, meter: Meter, reporter: Reporter | None
) -> None:
    """What is due at the run's step: numbers of the training and of dev, a checkpoint.

    Raises:
        BadRun: too many bad batches in a row.
    """
    settings, step = run.settings, run.step
    finished = step == settings.max_steps
    logs, saves = finished or step % settings.log_every == 0, is_regular(settings, step)
    if logs or saves:
        meter.look()
        if run.bad.in_a_row >= BAD_RUN:
            count, since = run.bad.in_a_row, run.bad.since
            raise BadRun(f"{count} bad batches in a row since step {since}", since, meter.seen)
    if logs:
        _report(run, reporter, meter.means() | _rates(run), "train")
    if finished or step % settings.valid_every == 0:
        numbers = dev_loss(run, dev)
        if settings.dev_wer:
            numbers |= dev_wer(run.model, dev, tokenizer, settings, run.world)
        run.dev_scores[step] = numbers.get("wer", numbers["loss"])
        _report(run, reporter, numbers, "dev")
    if saves:
        save_run(run)


def _report(run: Run, reporter: Reporter | None, numbers: dict[str, float], kind: str) -> None:
    """Reports numbers of the run's step, in the process that has the reporter."""

    def report() -> None:
        assert reporter is not None
        reporter.report(run.step, numbers, kind)

    run.world.as_writer(report)


def _stops_early(run: Run) -> bool:
    """Ends the run when the last `early_stop` dev WERs are no better than the best before them."""
    patience, wers = run.settings.early_stop, run.dev_scores
    if not patience or run.step not in wers:
        return False
    best = min(wers, key=lambda step: (wers[step], step))
    if sum(step > best for step in wers) < patience:
        return False
    log.warning(
        "early stop after step %d: the dev WER of %.2f %% at step %d was the best",
        run.step, wers[best], best,
    )  # fmt: skip
    if not is_regular(run.settings, run.step):
        save_run(run)
    path = run.experiment.stopped_early_path
    run.world.as_writer(lambda: atomic.write_text(path, f"{run.step}\n"))
    return True


def _rates(run: Run) -> dict[str, float]:
    """Learning rates, and the epoch that Eden's depend on."""
    groups = run.optimizer.param_groups
    rates = {"lr": groups[0]["lr"], "epoch": run.loader.epoch}
    for group in groups:
        names = [f"lr_{part}" for part in group.get("parts", ())] or ["lr"]
        rates |= dict.fromkeys(names, group["lr"])
    return rates


def _stop(run: Run, meter: Meter, signals: StopSignals) -> None:
    """Saves and leaves, to be run again."""
    meter.look()
    save_run(run)
    run.world.as_writer(run_again_path(run.experiment).touch)
    name = signals.received.name if signals.received else "a signal to another process"
    log.warning(
        "%s: stopped after step %d with all saved in %s; the same command goes on from there "
        "(exit code %d)",
        name, run.step, checkpoint_path(run.experiment, run.step), RUN_AGAIN,
    )  # fmt: skip
    sys.exit(RUN_AGAIN)


def _train_step(run: Run, shares: list[Batch]) -> Tensor:
    """One update of the weights, or none if loss or gradient are not finite.

    Args:
        run: at its new step.
        shares: of the step's batch, those of this process.

    Returns:
        The step's losses, summed over all processes, in the order of `monitor.LOSSES`, its encoder
        frames and the norm of the gradient; still on the device.
    """
    step = run.step
    from_scratch = run.experiment.config.init == "random"
    set_batch_count(run.model, schedule_count(run.settings, step, from_scratch))
    run.scheduler.step_epoch(run.loader.epoch)
    run.scheduler.step_batch(step)
    if run.rate != 1.0:
        for group in run.optimizer.param_groups:
            group["lr"] *= run.rate
    set_frozen(run.optimizer, step)
    sums = _gradients(run, shares)
    sums = run.world.sum_gradients(run.model.parameters(), sums)
    run.scaler.unscale_(run.optimizer)
    run.scaler.step(run.optimizer, skip=~sums.isfinite().all())
    run.scaler.update()
    return torch.cat([sums, run.optimizer.grad_norm.reshape(1).to(sums)])


def _gradients(run: Run, shares: list[Batch]) -> Tensor:
    """Leaves the gradients of the shares' losses in the parameters; returns their `_sums`.

    What does not fit into the memory is tried again in halves, quarters, ...; losses are sums over
    utterances, and so are their gradients.

    Raises:
        ValueError: a single utterance does not fit.
    """
    pieces = 1
    while True:
        run.optimizer.zero_grad(set_to_none=True)
        try:
            return torch.stack([_backward(run, i, s, pieces) for i, s in enumerate(shares)]).sum(0)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
        # Here, where the error and with it the tensors of the failed attempt are gone.
        names = ", ".join(name for share in shares for name in share.ids)
        most = max(len(share.ids) for share in shares)
        size = f"{most} cuts of up to {max(s.features.size(1) for s in shares) / 100:.1f} s"
        if pieces >= most:
            raise ValueError(
                f"step {run.step}: out of memory ({reason}) even with one utterance at a time, in "
                f"the batch of {size}: {names}. Lower data.max_seconds or take a larger machine"
            )
        pieces = min(2 * pieces, most)
        log.warning(
            "step %d: out of memory (%s) on the batch of %s: %s; trying again in %d pieces. If "
            "this happens often, lower train.batch_seconds",
            run.step, reason, size, names, pieces,
        )  # fmt: skip
        if run.device.type == "cuda":
            torch.cuda.empty_cache()


def _backward(run: Run, number: int, share: Batch, pieces: int) -> Tensor:
    """Adds the gradients of a share's loss.

    Args:
        run: its step and seed decide the tier, the masks and the dropout.
        number: of the share among those of this process.
        share: may be empty.
        pieces: so many at most are computed one after the other.

    Returns:
        The share's `_sums`.
    """
    settings, step = run.settings, run.step
    seed_everything(_step_seed(run.seed, step, number * run.world.size + run.world.rank))
    sums = torch.zeros(len(LOSSES) + 1, device=run.device)
    batch = share.to(run.device)
    if batch.ids:
        transform = make_transform(settings.spec_augment)
        batch = replace(batch, features=augment(transform, batch.features, share.feature_lens))
    for part in batch.split(pieces):
        losses, frames = _losses(run, part, part.features, *draw_tier(settings, run.seed, step))
        simple, pruned = loss_scales(step, settings.loss_warmup_steps, settings.simple_loss_scale)
        total = losses.total(simple, pruned, settings.ctc_loss_scale)
        run.scaler.scale(total).backward()  # type: ignore[no-untyped-call]
        sums += _sums(total, losses, frames)
    return sums


def _losses(
    run: Run, batch: Batch, features: Tensor, chunk_size: int, left: int
) -> tuple[TransducerLosses, Tensor]:
    """Losses of a batch at a tier, and its encoder frames."""
    with torch.autocast(run.device.type, run.precision, enabled=run.precision != torch.float32):
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
    """Mean losses for each encoder frame of all processes' dev batches, at one tier."""
    settings = run.settings
    run.model.eval()
    sums = [torch.zeros(len(LOSSES) + 1, device=run.device)]
    for batch in dev:
        on_device = batch.to(run.device)
        losses, frames = _losses(run, on_device, on_device.features, *dev_tier(settings))
        total = losses.total(settings.simple_loss_scale, 1.0, settings.ctc_loss_scale)
        sums.append(_sums(total, losses, frames))
    run.model.train()
    return per_frame(run.world.sum(torch.stack(sums).sum(dim=0)).tolist())


def _step_seed(seed: int, step: int, share: int) -> int:
    return (seed * 1_000_003 + step + share * 2_654_435_761) % 2**32


if __name__ == "__main__":
    run_stage(__doc__, train)
