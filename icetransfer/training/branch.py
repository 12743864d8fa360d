"""Shorter runs out of a long one: `python -m icetransfer.train --exp DIR --branch STEPS`.

Until its cool-down begins, a run's rate does not depend on its length.  So a run of 1,000 steps is
the long run up to the step where the short one would cool down, and a cool-down of its own: a curve
of WER over training length costs little more than its longest run.  The long run has to keep the
checkpoints that its branches begin at: `train.branches=[1000, 2000]`.  A branch is an experiment of
its own, DIR-1000steps, equal to the last bit to a run of that length with the same settings.
"""

import os
import shutil

from icetransfer.config import dump_config
from icetransfer.experiment import Experiment, log, write_provenance
from icetransfer.stage import atomic
from icetransfer.stage.stamp import sha256
from icetransfer.training.resume import average_period, branch_point, checkpoint_path
from icetransfer.training.scheme import Scheme, save, settle, settled_train


def branch_of(experiment: Experiment, steps: int) -> Experiment:
    """The experiment of a shorter run, with its config; nothing is written.

    Args:
        experiment: of the long run, which has got that far.
        steps: of the short run, one of `train.branches`.

    Raises:
        ValueError: no branch of this length can be made, and why.
    """
    long = settle(experiment)
    settings = settled_train(long.config)
    short = settings.model_copy(update={"max_steps": steps, "branches": ()})
    name = f"--branch {steps}"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"{name}: first without torchrun; then train the branch with it")
    if steps not in settings.branches or steps >= settings.max_steps:
        raise ValueError(
            f"{name}: expected one of train.branches={list(settings.branches)}, and less than the "
            f"{settings.max_steps} steps of {experiment.dir}: a run keeps the checkpoints that its "
            f"branches begin at only if they are named before it gets there"
        )
    if long.config.init == "random" or average_period(short) != average_period(settings):
        raise ValueError(
            f"{name}: the schedules of a run from init=random, and the average of one of under "
            f"{10 * settings.average_period} steps, depend on its length from the start: train it "
            f"whole, with train.max_steps={steps}"
        )
    point = branch_point(settings, steps)
    source = checkpoint_path(experiment, point)
    if not source.is_file():
        raise ValueError(f"{name}: {source} does not exist: train until step {point} first")
    config = long.config.model_copy(update={"train": short})
    return Experiment(experiment.dir.with_name(f"{experiment.dir.name}-{steps}steps"), config)


def make_branch(experiment: Experiment, steps: int) -> Experiment:
    """Makes the experiment of a shorter run, which then trains from where it leaves the long one.

    The long run may go on meanwhile: it keeps the checkpoint, and nothing of it is written.

    Args:
        experiment: of the long run, which has got that far.
        steps: of the short run, one of `train.branches`.

    Raises:
        ValueError: no branch of this length can be made, and why.
    """
    branch = branch_of(experiment, steps)
    if (branch.dir / "config.yaml").is_file():
        log.info("%s is there", branch.dir)
        return branch
    point = branch_point(settled_train(settle(experiment).config), steps)
    source = checkpoint_path(experiment, point)
    branch.checkpoints_dir.mkdir(parents=True, exist_ok=True)
    save(branch, Scheme({}, {}))  # nothing is open any more
    shutil.copyfile(experiment.init_checkpoint, branch.init_checkpoint)
    shutil.copyfile(experiment.dir / "transfer.json", branch.dir / "transfer.json")
    with atomic.atomic_path(checkpoint_path(branch, point)) as temporary:
        shutil.copyfile(source, temporary)
    write_provenance(branch, "branch", of=str(experiment.dir), step=point, sha256=sha256(source))
    atomic.write_text(branch.dir / "config.yaml", dump_config(branch.config))
    log.info("-> %s, from step %d of %s", branch.dir, point, experiment.dir)
    return branch
