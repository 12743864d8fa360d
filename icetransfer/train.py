"""Stage 6: multi-latency fine-tuning -> exp/checkpoints.

Each batch is trained at one chunk size and left context, drawn from the config's lists.  All that
is random in a step is a function of the seed and the step's number (the batch, the tier,
SpecAugment, dropout), so a run that was killed and resumed equals the undisturbed one, and runs
from EN and ML see the same batches at the same tiers with the same masks.
"""

import random
import sys
import time
from dataclasses import replace

import torch
from torch import Tensor

from icetransfer.average import update_averaged_model
from icetransfer.config import Train
from icetransfer.data.augment import augment, make_transform
from icetransfer.data.loader import Batch, dev_batches, dev_cuts
from icetransfer.data.tokenizer import Tokenizer
from icetransfer.experiment import (
    Experiment,
    log,
    run_stage,
    seed_everything,
    sha256,
    write_provenance,
)
from icetransfer.faults import BAD_RUN, RUN_AGAIN, BadRun, StopSignals, is_out_of_memory
from icetransfer.loss import TransducerLosses, loss_backend, loss_scales, transducer_loss
from icetransfer.model.scaling import set_batch_count
from icetransfer.monitor import Meter, Reporter, per_frame
from icetransfer.resume import (
    Run,
    average_period,
    checkpoint_path,
    go_back,
    is_regular,
    newest_checkpoint,
    save_run,
    set_frozen,
    start_run,
)

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
        OSError: a checkpoint could not be written.
        SystemExit: with RUN_AGAIN, after a signal and with all saved.
    """
    settings = experiment.config.train
    newest = newest_checkpoint(experiment)
    if newest and newest[0] == settings.max_steps:
        log.info("skip: %s is complete", checkpoint_path(experiment, newest[0]))
        return
    torch.set_num_threads(settings.threads)
    started = time.time()
    run = start_run(experiment, newest)
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
    with StopSignals() as signals:
        while run.step < settings.max_steps:
            try:
                _train_loop(run, dev, signals)
            except BadRun as bad:
                go_back(experiment, bad)
                run = start_run(experiment, newest_checkpoint(experiment))
    write_provenance(
        experiment,
        "train",
        steps=[first, run.step],
        seconds=round(time.time() - started, 1),
        device=str(run.device),
        loss_backend=backend,
        skipped_batches=run.bad.total,
        checkpoint_sha256=sha256(checkpoint_path(experiment, settings.max_steps)),
    )


def _train_loop(run: Run, dev: list[Batch], signals: StopSignals) -> None:
    """Steps until the last one.

    Raises:
        BadRun: too many bad batches in a row.
        SystemExit: after a signal.
    """
    settings = run.settings
    transform = make_transform(settings.spec_augment)
    meter = Meter(run.bad)
    run.model.train()
    reporter = Reporter(run.experiment.dir, run.step, settings.max_steps)
    try:
        for batch in run.loader:
            run.step += 1
            seed_everything(_step_seed(run.seed, run.step))
            on_device = batch.to(run.device)
            features = augment(transform, on_device.features, batch.feature_lens)
            try:
                numbers = _train_step(run, on_device, features)
            except FloatingPointError as error:  # most of the recent gradients were bad
                meter.look()
                raise BadRun(str(error), run.bad.since, meter.seen) from None
            meter.add(run.step, [batch], numbers)
            update_averaged_model(run.step, average_period(settings), run.model, run.averaged)
            reporter.progress(run.step)
            _report_and_save(run, dev, meter, reporter)
            if run.step == settings.max_steps:
                return
            if signals.received:
                _stop(run, meter, signals.received.name)
    finally:
        reporter.close()


def _report_and_save(run: Run, dev: list[Batch], meter: Meter, reporter: Reporter) -> None:
    """What is due at the run's step: numbers of the training, dev losses, a checkpoint.

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
        reporter.report(step, meter.means() | _rates(run), "train")
    if finished or step % settings.valid_every == 0:
        numbers = dev_loss(run, dev)
        run.dev_losses[step] = numbers["loss"]
        reporter.report(step, numbers, "dev")
    if saves:
        save_run(run)


def _rates(run: Run) -> dict[str, float]:
    """Learning rates, and the epoch that Eden's depend on."""
    groups = run.optimizer.param_groups
    rates = {"lr": groups[0]["lr"], "epoch": run.loader.epoch}
    for group in groups:
        names = [f"lr_{part}" for part in group.get("parts", ())] or ["lr"]
        rates |= dict.fromkeys(names, group["lr"])
    return rates


def _stop(run: Run, meter: Meter, name: str) -> None:
    """Saves and leaves, to be run again."""
    meter.look()
    save_run(run)
    log.warning(
        "%s: stopped after step %d with all saved in %s; the same command goes on from there "
        "(exit code %d)",
        name, run.step, checkpoint_path(run.experiment, run.step), RUN_AGAIN,
    )  # fmt: skip
    sys.exit(RUN_AGAIN)


def _train_step(run: Run, batch: Batch, features: Tensor) -> Tensor:
    """One update of the weights, or none if loss or gradient are not finite.

    Returns:
        The batch's summed losses in the order of `monitor.LOSSES`, its encoder frames and the norm
        of the gradient; still on the device.
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
    sums = _gradients(run, replace(batch, features=features))
    run.optimizer.step(skip=~sums.isfinite().all())
    return torch.cat([sums, run.optimizer.grad_norm.reshape(1).to(sums)])


def _gradients(run: Run, batch: Batch) -> Tensor:
    """Leaves the gradients of a batch's loss in the parameters; returns its `_sums`.

    A batch that does not fit into the memory is tried again in halves, quarters, ...; losses are
    sums over utterances, and so are their gradients.

    Raises:
        ValueError: a single utterance does not fit.
    """
    pieces = 1
    while True:
        run.optimizer.zero_grad(set_to_none=True)
        try:
            return torch.stack([_backward(run, part) for part in batch.split(pieces)]).sum(dim=0)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
        # Here, where the error and with it the tensors of the failed attempt are gone.
        names = ", ".join(batch.ids)
        size = f"{len(batch.ids)} cuts of up to {batch.features.size(1) / 100:.1f} s"
        if pieces >= len(batch.ids):
            raise ValueError(
                f"step {run.step}: out of memory ({reason}) even with one utterance at a time, in "
                f"the batch of {size}: {names}. Lower data.max_seconds or take a larger machine"
            )
        pieces = min(2 * pieces, len(batch.ids))
        log.warning(
            "step %d: out of memory (%s) on the batch of %s: %s; trying again in %d pieces. If "
            "this happens often, lower train.batch_seconds",
            run.step, reason, size, names, pieces,
        )  # fmt: skip
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        seed_everything(_step_seed(run.seed, run.step))


def _backward(run: Run, batch: Batch) -> Tensor:
    """Adds the gradients of a batch's loss; returns its `_sums`."""
    settings, step = run.settings, run.step
    chunk_size, left = draw_tier(settings, run.seed, step)
    losses, frames = _losses(run, batch, batch.features, chunk_size, left)
    simple, pruned = loss_scales(step, settings.loss_warmup_steps, settings.simple_loss_scale)
    total = losses.total(simple, pruned, settings.ctc_loss_scale)
    total.backward()  # type: ignore[no-untyped-call]
    return _sums(total, losses, frames)


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


if __name__ == "__main__":
    run_stage(__doc__, train)
