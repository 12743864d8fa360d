"""Stage 6: multi-latency fine-tuning -> exp/checkpoints.

Each batch is trained at one chunk size and left context, drawn from the config's lists.  All that
is random in a step is a function of the seed and the step's number (the batch, the tier,
SpecAugment, dropout), so a run that was killed and resumed equals the undisturbed one, and runs
from EN and ML see the same batches at the same tiers with the same masks.

`train` is the loop and `train_step` all that happens in a step, in its order.  What is needed when
something goes wrong is called from there: `training/memory.py` splits a batch that does not fit,
`training/resume.py` goes back after bad batches, `training/faults.py` takes signals.
"""

import logging
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from icetransfer.config import Train
from icetransfer.data.augment import make_transform
from icetransfer.data.blocks import hold_blocks
from icetransfer.data.loader import Batch
from icetransfer.data.subset import subset_path
from icetransfer.experiment import (
    RUN_AGAIN,
    Experiment,
    enter_recipe,
    log,
    open_experiment,
    run_logged,
    seed_everything,
    stage_parser,
    write_provenance,
)
from icetransfer.model import gpu
from icetransfer.model.averaging import update_averaged_model
from icetransfer.model.scaling import set_batch_count
from icetransfer.stage import atomic
from icetransfer.stage.stamp import sha256
from icetransfer.training.augment import augment
from icetransfer.training.branch import branch_of, make_branch
from icetransfer.training.diagnosis import diagnose, moments, spread, token_entropy
from icetransfer.training.distributed import World, join_world
from icetransfer.training.faults import BAD_RUN, BadRun, StopSignals, naming_lost_workers
from icetransfer.training.loss import TransducerLosses, loss_backend, loss_scales, transducer_loss
from icetransfer.training.memory import until_it_fits
from icetransfer.training.monitor import LOSSES, Meter, Reporter, per_frame
from icetransfer.training.preflight import decide_and_try
from icetransfer.training.resume import (
    Run,
    agree_on_newest,
    average_period,
    checkpoint_path,
    go_back,
    is_regular,
    run_again_path,
    save_run,
    set_frozen,
    start_run,
)
from icetransfer.training.scheme import Settled
from icetransfer.training.validate import dev_wer

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


def schedule_count(settings: Settled, step: int, from_scratch: bool) -> float:
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
    with join_world() as world, StopSignals() as signals, naming_lost_workers():
        run = begin(experiment, world)
        if run is None:
            return
        first, started = run.step, time.monotonic()
        while not is_over(run):
            meter = Meter(run.bad, run.world)
            try:
                with reporting(run) as reporter:
                    batches = iter(run.loader)
                    while not is_over(run):
                        stop_if_asked(run, meter, signals)
                        train_step(run, batches, meter, reporter)
            except (BadRun, FloatingPointError) as error:
                run = start_again(run, meter, error)
        if world.is_writer:
            write_train_provenance(run, first, time.monotonic() - started)


def train_step(
    run: Run, batches: Iterator[Batch], meter: Meter, reporter: Reporter | None
) -> Tensor:
    """One update of the weights, or none if loss or gradient are not finite, and what is then due.

    Args:
        run: its step is the last one done.
        batches: of the run's loader.
        meter: takes the step's losses in.
        reporter: in the process that writes files.

    Returns:
        The step's losses, summed over all processes, in the order of `monitor.LOSSES`, its encoder
        frames and the norm of the gradient; still on the device.

    Raises:
        BadRun: too many bad batches in a row.
        FloatingPointError: most of the recent gradients were bad.
    """
    shares = [next(batches) for _ in range(run.settings.accumulate)]
    run.step += 1
    tier = draw_tier(run.settings, run.seed, run.step)
    set_schedules(run)
    for attempt in until_it_fits(run.step, shares):
        with attempt:
            sums = forward_backward(run, shares, tier, attempt.pieces)
    sums = run.gradient_sums.finish(sums)
    numbers = clip_and_step(run, sums)
    update_averaged_model(run.step, average_period(run.settings), run.model, run.averaged)
    meter.add(run.step, shares, numbers)
    report(run, meter, reporter)
    if is_regular(run.settings, run.step):
        save_run(run)
    return numbers


def forward_backward(
    run: Run, shares: list[Batch], tier: tuple[int, int], pieces: int = 1
) -> Tensor:
    """Leaves the gradients of this process's shares of a batch in the parameters.

    Args:
        run: its step and seed decide the masks and the dropout.
        shares: may be empty ones.
        tier: chunk size and left context.
        pieces: so many at most of each share are computed one after the other.

    Returns:
        The `loss_sums` of the shares.
    """
    settings, step = run.settings, run.step
    simple, pruned = loss_scales(step, settings.loss_warmup_steps, settings.simple_loss_scale)
    transform = make_transform(settings.spec_augment)
    run.optimizer.zero_grad(set_to_none=True)
    sums = torch.zeros(len(shares), len(LOSSES) + 1, device=run.device)
    for number, share in enumerate(shares):
        seed_everything(_step_seed(run.seed, step, number * run.world.size + run.world.rank))
        batch = share.to(run.device)
        if batch.ids:
            batch = replace(batch, features=augment(transform, batch.features, share.feature_lens))
        for part in batch.split(pieces):
            losses, _, out_lens = compute_losses(run, part, part.features, *tier)
            total = losses.total(simple, pruned, settings.ctc_loss_scale)
            is_last = pieces == 1 and number == len(shares) - 1
            # In this thread: to hand over to autograd's own costs more than a tenth of a step.
            with (
                torch.autograd.set_multithreading_enabled(False),
                run.gradient_sums.last_backward() if is_last else nullcontext(),
            ):
                run.scaler.scale(total).backward()  # type: ignore[no-untyped-call]
            sums[number] += loss_sums(total, losses, out_lens.sum())
    return sums.sum(0)


def compute_losses(
    run: Run, batch: Batch, features: Tensor, chunk_size: int, left: int
) -> tuple[TransducerLosses, Tensor, Tensor]:
    """Losses of a batch at a tier, its encoder output (N, T4, C) and the lengths of that (N,)."""
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
    return losses, out, out_lens


def loss_sums(total: Tensor, losses: TransducerLosses, frames: Tensor) -> Tensor:
    """The losses in the order of `monitor.LOSSES`, then the encoder frames, detached."""
    ctc = torch.zeros_like(total) if losses.ctc is None else losses.ctc
    frames = frames.to(total.device, total.dtype, non_blocking=True)
    parts = (total, losses.simple, losses.pruned, ctc, frames)
    return torch.stack([part.detach() for part in parts])


def clip_and_step(run: Run, sums: Tensor) -> Tensor:
    """Steps the optimiser, which clips the gradient, unless a loss is not finite.

    Returns:
        `sums` and the norm of the gradient.
    """
    run.scaler.unscale_(run.optimizer)
    run.scaler.step(run.optimizer, skip=~sums.isfinite().all())
    run.scaler.update()
    return torch.cat([sums, run.optimizer.grad_norm.reshape(1).to(sums)])


def set_schedules(run: Run) -> None:
    """Brings the regularisers, the learning rates and the frozen parts to the run's step."""
    from_scratch = run.experiment.config.init == "random"
    set_batch_count(run.model, schedule_count(run.settings, run.step, from_scratch))
    run.scheduler.step_epoch(run.loader.epoch)
    run.scheduler.step_batch(run.step)
    if run.rate != 1.0:
        for group in run.optimizer.param_groups:
            group["lr"] *= run.rate
    set_frozen(run.optimizer, run.step)


def report(run: Run, meter: Meter, reporter: Reporter | None) -> None:
    """What is due at the run's step: its place, numbers of the training and of dev.

    Raises:
        BadRun: too many bad batches in a row.
    """
    settings, step = run.settings, run.step
    if reporter:
        reporter.progress(step)
    finished = step == settings.max_steps
    logs = finished or step % settings.log_every == 0
    if logs or is_regular(settings, step):
        meter.look()
        if run.bad.in_a_row >= BAD_RUN:
            count, since = run.bad.in_a_row, run.bad.since
            raise BadRun(f"{count} bad batches in a row since step {since}", since, meter.seen)
    if logs:
        _write_numbers(run, reporter, meter.means() | _rates(run), "train")
    if finished or step % settings.valid_every == 0:
        numbers = dev_loss(run, run.dev)
        if settings.dev_wer:
            numbers |= dev_wer(run.model, run.dev, run.tokenizer, settings, run.world)
        run.dev_scores[step] = numbers.get("wer", numbers["loss"])
        _write_numbers(run, reporter, numbers, "dev")
        if 2 * step >= settings.max_steps and (found := diagnose(numbers)):
            log.warning("after step %d of %d: %s", step, settings.max_steps, found)


def _write_numbers(
    run: Run, reporter: Reporter | None, numbers: dict[str, float], kind: str
) -> None:
    """Reports numbers of the run's step, in the process that has the reporter."""

    def write() -> None:
        assert reporter is not None
        reporter.report(run.step, numbers, kind)

    run.world.as_writer(write)


def _rates(run: Run) -> dict[str, float]:
    """Learning rates, and the epoch that Eden's depend on."""
    groups = run.optimizer.param_groups
    rates = {"lr": groups[0]["lr"], "epoch": run.loader.epoch}
    for group in groups:
        names = [f"lr_{part}" for part in group.get("parts", ())] or ["lr"]
        rates |= dict.fromkeys(names, group["lr"])
    return rates


@torch.no_grad()
def dev_loss(run: Run, dev: list[Batch]) -> dict[str, float]:
    """Of all processes' dev batches at one tier: mean losses for each encoder frame.

    Beside them `spread` and `deaf_loss`, which `training/diagnosis.py` explains.
    """
    settings = run.settings
    run.model.eval()
    sums = [torch.zeros(len(LOSSES) + 1, device=run.device)]
    heard = [torch.zeros(run.model.dims.encoder_out_dim + 1, device=run.device)]
    for batch in dev:
        on_device = batch.to(run.device)
        losses, out, out_lens = compute_losses(
            run, on_device, on_device.features, *dev_tier(settings)
        )
        total = losses.total(settings.simple_loss_scale, 1.0, settings.ctc_loss_scale)
        sums.append(loss_sums(total, losses, out_lens.sum()))
        heard.append(moments(out, out_lens))
    run.model.train()
    own = [torch.stack(sums).sum(0), torch.stack(heard).sum(0)]
    numbers = run.world.sum(torch.cat([*own, own[0].new_tensor([token_entropy(dev)])])).cpu()
    losses_and_frames, entropy = numbers[: len(LOSSES) + 1].tolist(), float(numbers[-1])
    frames = losses_and_frames[-1]
    return per_frame(losses_and_frames) | {
        "spread": spread(numbers[len(LOSSES) + 1 : -1], frames),
        "deaf_loss": entropy / max(frames, 1),
    }


def _step_seed(seed: int, step: int, share: int) -> int:
    return (seed * 1_000_003 + step + share * 2_654_435_761) % 2**32


def begin(experiment: Experiment, world: World) -> Run | None:
    """The run at its newest checkpoint, or at init.pt; None where it is complete."""
    if not world.is_writer:
        log.setLevel(logging.ERROR)  # all of them have the same to say
    newest = agree_on_newest(experiment, world)
    world.as_writer(lambda: run_again_path(experiment).unlink(missing_ok=True))
    world.as_writer(
        lambda: decide_and_try(experiment, forward_backward, world.size, newest is not None)
    )
    if newest and newest[0] == experiment.final_step:
        if subset_path(experiment).is_file():
            world.as_writer(lambda: hold_blocks(experiment))  # refuses other data than it learned
        log.info("skip: %s is complete", checkpoint_path(experiment, newest[0]))
        return None
    torch.set_num_threads(experiment.config.train.threads)
    if slower := gpu.prepare():
        log.warning("%s", slower)
    run = start_run(experiment, newest, world)
    settings = run.settings
    _ = run.dev  # read now, so that what is wrong with it is not found after hours
    if run.step:
        log.info("going on from step %d", run.step)
    log.info(
        "%d parameters, %.1f minutes of audio at all speeds, %d x %s, %s, %d threads, loss by %s",
        sum(parameter.numel() for parameter in run.model.parameters()), run.loader.seconds / 60,
        world.size, run.device, run.precision, settings.threads,
        loss_backend(settings.loss_backend),
    )  # fmt: skip
    return run


@contextmanager
def reporting(run: Run) -> Iterator[Reporter | None]:
    """The reporter, in the process that writes files; the model is in training."""
    run.model.train()
    reporter: Reporter | None = None

    def open_reporter() -> None:
        nonlocal reporter
        reporter = Reporter(run.experiment.dir, run.step, run.settings.max_steps)

    run.world.as_writer(open_reporter)
    try:
        yield reporter
    finally:
        if reporter:
            reporter.close()


def is_over(run: Run) -> bool:
    """After the last step, or when `early_stop` dev WERs are no better than the best before."""
    return run.step >= run.settings.max_steps or _stops_early(run)


def _stops_early(run: Run) -> bool:
    """Ends the run when the last `early_stop` dev WERs are no better than the best before them."""
    patience, wers = run.settings.early_stop, run.dev_scores
    if not patience or run.step not in wers:
        return False
    best = min(wers, key=lambda step: (wers[step], step))
    if sum(step > best for step in wers) < patience:
        return False
    if run.experiment.final_step == run.step:
        return True  # said before
    log.warning(
        "early stop after step %d: the dev WER of %.2f %% at step %d was the best",
        run.step, wers[best], best,
    )  # fmt: skip
    if not is_regular(run.settings, run.step):
        save_run(run)
    path = run.experiment.stopped_early_path
    run.world.as_writer(lambda: atomic.write_text(path, f"{run.step}\n"))
    return True


def stop_if_asked(run: Run, meter: Meter, signals: StopSignals) -> None:
    """After a signal to any of the processes: saves and leaves, to be run again.

    Raises:
        SystemExit: with RUN_AGAIN.
    """
    if not run.world.any(signals.received is not None):
        return
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


def start_again(run: Run, meter: Meter, error: BadRun | FloatingPointError) -> Run:
    """The run at an earlier checkpoint and a lower rate, after a run of bad batches.

    Raises:
        ValueError: it has come too often.
    """
    if isinstance(error, FloatingPointError):
        meter.look()
        error = BadRun(str(error), run.bad.since, meter.seen)
    bad, experiment, world = error, run.experiment, run.world
    world.as_writer(lambda: go_back(experiment, bad))
    return start_run(experiment, agree_on_newest(experiment, world), world)


def write_train_provenance(run: Run, first: int, seconds: float) -> None:
    """Says in provenance.json what this process has trained, from step `first` on."""
    write_provenance(
        run.experiment,
        "train",
        steps=[first, run.step],
        seconds=round(seconds, 1),
        device=str(run.device),
        processes=run.world.size,
        precision=str(run.precision),
        loss_backend=loss_backend(run.settings.loss_backend),
        skipped_batches=run.bad.total,
        checkpoint_sha256=sha256(checkpoint_path(run.experiment, run.step)),
    )


def _run() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument(
        "--branch", type=int, metavar="STEPS",
        help="train a shorter run from where it would leave this one, in DIR-<STEPS>steps",
    )  # fmt: skip
    args = parser.parse_args()

    def find() -> Experiment:
        args.exp = enter_recipe(args.exp)
        experiment = open_experiment(args.exp)
        return experiment if args.branch is None else branch_of(experiment, args.branch)

    def stage(experiment: Experiment) -> None:
        if args.branch is not None:
            make_branch(open_experiment(args.exp), args.branch)
        train(experiment)

    run_logged(find, stage)


if __name__ == "__main__":
    _run()
