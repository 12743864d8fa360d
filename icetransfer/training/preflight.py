"""What would end a run after hours, tried before its first step.

The longest and the fullest recording of the training data, in batches as large as any will be, go
forward and backward at every tier; one dev batch is decoded; the disk has to hold the checkpoints.
Where the config leaves `train.batch_seconds` open, it is halved until such a batch fits into the
memory.  Nothing of the try stays: the run begins afterwards as if there had been none.
"""

import itertools
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from icetransfer.config import chunk_label
from icetransfer.data.blocks import encoder_frames
from icetransfer.data.loader import Batch
from icetransfer.data.subset import subset_path
from icetransfer.experiment import Experiment, log
from icetransfer.settings.augment import Silence
from icetransfer.stage.json_file import read_json
from icetransfer.training import scheme
from icetransfer.training.memory import Attempt
from icetransfer.training.resume import Run, start_run
from icetransfer.training.scheme import Settled
from icetransfer.training.validate import dev_wer

FRAMES_PER_SECOND = 100
CHECKPOINT_MODELS = 5  # the model, its average, and the optimiser's moments and scales
SPARE_CHECKPOINTS = 2  # one that is being written, and where the average begins

ForwardBackward = Callable[[Run, list[Batch], tuple[int, int]], Tensor]


@dataclass(frozen=True)
class Extreme:
    """A recording that asks most of the memory: feature frames and tokens."""

    frames: int
    tokens: int

    def batch(self, settings: Settled) -> Batch:
        """As many of it as a batch takes, of noise: it is the shapes that count."""
        seconds = self.frames / FRAMES_PER_SECOND
        rows = max(1, int(settings.batch_seconds / seconds))
        draw = torch.Generator().manual_seed(1)
        tokens = min(self.tokens, encoder_frames(self.frames))
        return Batch(
            features=torch.randn(rows, self.frames, 80, generator=draw) - 6,
            feature_lens=torch.full((rows,), self.frames),
            tokens=torch.full((rows, tokens), 3),
            token_lens=torch.full((rows,), tokens),
            ids=tuple(f"preflight-{row}" for row in range(rows)),
            seconds=rows * seconds,
        )


def extremes(run: Run) -> list[Extreme]:
    """The longest and the fullest recording that the run trains on, with pauses if it adds any."""
    path = run.experiment.dir / "train_data" / "index.json"
    index = read_json(path, ["longest", "fullest"])
    pauses = sum(
        2 * round(FRAMES_PER_SECOND * section.seconds[1])
        for section in run.settings.augment
        if isinstance(section, Silence)
    )
    sizes = (index[name] for name in ("longest", "fullest"))
    return [Extreme(frames + pauses, tokens) for frames, tokens in sizes]


def tiers(settings: Settled) -> list[tuple[int, int]]:
    """Every chunk size, with the left context that takes most memory."""
    left = -1 if -1 in settings.left_context_frames else max(settings.left_context_frames)
    return [(size, -1 if size == -1 else left) for size in settings.chunk_sizes]


def find_misfit(run: Run, forward_backward: ForwardBackward) -> str:
    """Tries the largest batches at every tier.

    Returns:
        "" if they fit into the memory, else which one does not, and the error's first line.

    Raises:
        ValueError: a batch of a single recording does not fit.
    """
    misfit = ""
    for extreme, tier in itertools.product(extremes(run), tiers(run.settings)):
        batch = extreme.batch(run.settings)
        with Attempt(pieces=1) as attempt:
            forward_backward(run, [batch], tier)
        if attempt.failure:
            misfit = (
                f"{len(batch.ids)} recordings of {batch.seconds / len(batch.ids):.1f} s at "
                f"{chunk_label(tier[0])} do not fit into the memory ({attempt.failure})"
            )
            break
    run.optimizer.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if misfit and len(batch.ids) == 1:
        raise ValueError(f"{misfit}: lower data.max_seconds, or take a larger machine")
    return misfit


def check_disk(run: Run) -> None:
    """Refuses to begin what the disk cannot hold.

    Raises:
        ValueError: there is less room than the run's checkpoints take.
    """
    settings = run.settings
    model = sum(p.numel() * p.element_size() for p in run.model.parameters())
    count = settings.keep_checkpoints + settings.keep_best + SPARE_CHECKPOINTS
    needed, free = CHECKPOINT_MODELS * model * count, shutil.disk_usage(run.experiment.dir).free
    if free < needed:
        raise ValueError(
            f"{run.experiment.dir}: {count} checkpoints of {CHECKPOINT_MODELS * model / 1e6:.0f} "
            f"MB need {needed / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB: make room, "
            f"lower train.keep_checkpoints or train.keep_best, or take an --exp on another disk"
        )


def preflight(run: Run, forward_backward: ForwardBackward) -> str:
    """Tries what a run will need before it begins.

    Args:
        run: at step 0, in one process; thrown away afterwards.
        forward_backward: `train.forward_backward`.

    Returns:
        Which batch does not fit into the memory, "" if all do.

    Raises:
        ValueError: the disk is too small, or a single recording does not fit.
    """
    check_disk(run)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats(run.device)
    run.model.train()
    misfit = find_misfit(run, forward_backward)
    if misfit:
        return misfit
    dev_wer(run.model, run.dev[:1], run.tokenizer, run.settings, run.world)
    log.info(
        "preflight: the longest and the fullest recording in batches of %g s at %d tiers%s, a dev "
        "batch decoded, room for the checkpoints",
        run.settings.batch_seconds, len(run.settings.chunk_sizes), _memory(run.device),
    )  # fmt: skip
    return ""


def _memory(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    peak, whole = (
        torch.cuda.max_memory_allocated(device),
        torch.cuda.get_device_properties(device).total_memory,
    )
    return f" in {peak / 2**30:.1f} of {whole / 2**30:.0f} GiB of the GPU"


def decide_and_try(
    experiment: Experiment, forward_backward: ForwardBackward, processes: int, is_begun: bool
) -> None:
    """Writes `scheme.json`, unless it is there: what the config leaves open, decided and tried.

    Args:
        experiment: whose hours are chosen; without them nothing is done.
        forward_backward: `train.forward_backward`.
        processes: that will train together.
        is_begun: whether there is a checkpoint already; then nothing is tried.

    Raises:
        ValueError: what the run needs is not there, and says what.
    """
    if experiment.scheme_path.is_file() or not subset_path(experiment).is_file():
        return
    config, seconds = experiment.config, scheme.training_seconds(experiment)
    decided = scheme.decide(config, seconds, processes)
    is_open = config.train.batch_seconds is None
    while not is_begun and (misfit := preflight(_run(experiment, decided), forward_backward)):
        if not is_open:
            log.warning(
                "preflight: %s; such a batch will be computed in pieces, which takes longer: "
                "lower train.batch_seconds, or leave it out to have it found", misfit,
            )  # fmt: skip
            break
        batch = decided.values["batch_seconds"] / 2
        log.info("preflight: %s; trying %g s", misfit, batch)
        train = config.train.model_copy(update={"batch_seconds": batch})
        fixed = config.model_copy(update={"train": train})
        decided = scheme.decide(fixed, seconds, processes)
        decided.values["batch_seconds"] = batch
        decided.reasons["batch_seconds"] = "the most that the memory holds, by halves"
    for line in scheme.lines(decided):
        log.info("%s", line)
    scheme.save(experiment, decided)


def _run(experiment: Experiment, decided: scheme.Scheme) -> Run:
    """A run as it would begin, in this process alone."""
    settled = replace(experiment, config=scheme.merge(experiment.config, decided.values))
    return start_run(settled, None)
