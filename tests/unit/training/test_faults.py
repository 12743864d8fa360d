"""Runs that are killed, stopped, poisoned, or find their files damaged."""

import errno
import functools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from icetransfer import train
from icetransfer.data import features, loader
from icetransfer.experiment import RUN_AGAIN, Experiment
from icetransfer.model import checkpoint
from icetransfer.model.checkpoint import DamagedError, read_checkpoint
from icetransfer.training import faults, resume
from icetransfer.training.distributed import World
from icetransfer.training.memory import until_it_fits

SOURCES = str(Path(train.__file__).parent)


def weights(experiment: Experiment, step: int = 8) -> dict[str, torch.Tensor]:
    return read_checkpoint(resume.checkpoint_path(experiment, step)).state_dict


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def metrics(experiment: Experiment) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (experiment.dir / "metrics.jsonl").open()]


@pytest.fixture(scope="module")
def undisturbed(prepare: Callable[..., Experiment]) -> Experiment:
    experiment = prepare("undisturbed")
    train.train(experiment)
    return experiment


def in_child(experiment: Experiment, before: Callable[[], None] = lambda: None) -> int:
    """Trains in a forked process, after `before`; returns its exit code, -9 for SIGKILL."""

    def run() -> None:
        before()
        train.train(experiment)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def kill_at_call(number: int) -> Callable[[], None]:
    """Makes the process kill itself at its `number`-th call of a function of the package."""
    left = number

    def count(frame: Any, event: str, _: object) -> None:
        nonlocal left
        if event == "call" and frame.f_code.co_filename.startswith(SOURCES):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return lambda: sys.setprofile(count)


def kill_while_writing() -> None:
    """Makes the process kill itself when half of its first checkpoint is on the disk."""
    save = torch.save

    def half(content: dict[str, Any], path: Path) -> None:
        save(content, path)
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half


def test_killed_at_ten_random_moments(prepare) -> None:
    undisturbed, killed = (prepare(name, "train.max_steps=24") for name in ("long", "killed"))
    train.train(undisturbed)
    assert train.begin(killed, World())  # what is tried before the first step is not tried again
    draw = random.Random(3)
    # Some 5600 calls until the first step, and 1500 or more for each step.
    kills = [kill_at_call(draw.randrange(4500, 14000)) for _ in range(8)] + [kill_while_writing] * 2
    draw.shuffle(kills)
    assert [in_child(killed, kill) for kill in kills] == [-signal.SIGKILL] * 10
    assert 0 < resume.saved_steps(killed)[-1] < 24
    assert in_child(killed) == 0
    assert_same(weights(undisturbed, 24), weights(killed, 24))
    names = sorted(path.name for path in killed.checkpoints_dir.iterdir())
    assert names == sorted(path.name for path in undisturbed.checkpoints_dir.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_leaves_to_be_run_again(
    prepare, undisturbed: Experiment, number: signal.Signals
) -> None:
    experiment = prepare(f"signal{number}")
    step = train.Reporter.progress

    def raise_it(self: Any, done: int) -> None:
        step(self, done)
        if done == 4:
            os.kill(os.getpid(), number)

    def patch() -> None:
        train.Reporter.progress = raise_it  # type: ignore[method-assign]

    assert in_child(experiment, patch) == RUN_AGAIN == 75
    assert resume.saved_steps(experiment) == [3, 4]
    assert in_child(experiment) == 0
    assert_same(weights(undisturbed), weights(experiment))
    assert resume.saved_steps(experiment) == resume.saved_steps(undisturbed)


def test_the_stage_has_the_exit_code_too(prepare) -> None:
    experiment = prepare("command")
    code = (
        "import os, signal, sys; from icetransfer import train; from icetransfer.experiment import "
        "run_stage; train.Reporter.progress = lambda *_: os.kill(os.getpid(), signal.SIGTERM); "
        "run_stage('', train.train)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--exp", experiment.dir], capture_output=True, text=True
    )
    assert done.returncode == RUN_AGAIN, done.stderr
    assert "SIGTERM: stopped after step 1 with all saved" in done.stderr


class Poison:
    """Makes the losses or gradients of chosen steps useless."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, wanted: Callable[[int], bool]) -> None:
        self.inner = train.compute_losses
        self.wanted = wanted
        self.ids: dict[int, tuple[str, ...]] = {}
        self.first_rates: dict[int, float] = {}
        self.rates: dict[int, float] = {}
        monkeypatch.setattr(train, "compute_losses", self)

    def left(self) -> bool:
        """True for the first ten steps, whatever their numbers."""
        return len(self.ids) < 10

    def __call__(self, run: Any, batch: Any, features: Any, *tier: int) -> Any:
        if run.model.training:
            self.rates[run.step] = run.optimizer.param_groups[0]["lr"]
            self.first_rates.setdefault(run.step, self.rates[run.step])
            if self.wanted(run.step):
                self.ids[run.step] = batch.ids
                features = features.clone()
                features[0, 0, 0] = torch.nan
        return self.inner(run, batch, features, *tier)


def test_a_nan_in_a_feature_costs_its_batch_alone(prepare, monkeypatch, caplog) -> None:
    experiment = prepare("nan", "train.checkpoint_every=1", "train.keep_checkpoints=9")
    poison = Poison(monkeypatch, lambda step: step == 4)
    with caplog.at_level("WARNING", logger="icetransfer"):
        train.train(experiment)
    cuts = ", ".join(poison.ids[4])
    assert f"step 4: loss nan, gradient norm nan; batch skipped, its cuts: {cuts}\n" in caplog.text
    assert_same(weights(experiment, 3), weights(experiment, 4))
    name = "encoder_embed.out.weight"
    assert not torch.equal(weights(experiment, 4)[name], weights(experiment, 5)[name])
    assert all(value.isfinite().all() for value in weights(experiment).values())
    provenance = json.loads((experiment.dir / "provenance.json").read_text())
    assert provenance["train"]["skipped_batches"] == 1
    assert metrics(experiment)[-2]["skipped_batches"] == 1


def test_an_infinite_loss_with_finite_gradients_is_skipped_too(prepare, monkeypatch) -> None:
    experiment = prepare("inf", "train.checkpoint_every=1", "train.keep_checkpoints=9")
    sums = train.loss_sums

    def infinite(total: torch.Tensor, *rest: Any) -> torch.Tensor:
        infinite.calls += 1
        return sums(total + (torch.inf if infinite.calls == 4 else 0), *rest)

    infinite.calls = 0
    assert train.begin(experiment, World())
    monkeypatch.setattr(train, "loss_sums", infinite)
    train.train(experiment)
    assert_same(weights(experiment, 3), weights(experiment, 4))


# Bad from step 13 on, after the optimiser's first threshold; seen at step 22, where the final
# average begins.
BAD_FROM = ("train.max_steps=32", "train.log_every=8", "train.checkpoint_every=4")


def test_a_run_of_bad_batches_goes_back_with_a_lower_rate(prepare, monkeypatch, caplog) -> None:
    experiment = prepare("back", *BAD_FROM)
    poison = Poison(monkeypatch, lambda step: step >= 13 and poison.left())
    with caplog.at_level("WARNING", logger="icetransfer"):
        train.train(experiment)
    (entry,) = faults.read_returns(resume.returns_path(experiment))
    assert (entry.since, entry.to, len(entry.seen)) == (13, 12, 11)
    assert (
        "10 bad batches in a row since step 13: back to step 12, from now on at 0.5" in caplog.text
    )
    assert poison.rates[13] == pytest.approx(0.5 * poison.first_rates[13])
    assert all(value.isfinite().all() for value in weights(experiment, 32).values())
    assert metrics(experiment)[-1]["step"] == 32


def test_twenty_infinite_losses_cost_two_returns_and_nothing_else(
    prepare, monkeypatch, caplog
) -> None:
    experiment = prepare("twenty", *BAD_FROM)
    sums, left = train.loss_sums, [20]

    def infinite(total: torch.Tensor, *rest: Any) -> torch.Tensor:
        bad = infinite.step >= 13 and left[0] > 0
        left[0] -= bad
        return sums(total + torch.inf if bad else total, *rest)

    inner = train.forward_backward

    def counted(run: Any, *rest: Any) -> torch.Tensor:
        infinite.step = run.step
        summed = inner(run, *rest)
        infinite.step = 0  # not in the dev loss
        return summed

    infinite.step = 0
    monkeypatch.setattr(train, "loss_sums", infinite)
    monkeypatch.setattr(train, "forward_backward", counted)
    with caplog.at_level("WARNING", logger="icetransfer"):
        train.train(experiment)
    assert left == [0]
    first, second = faults.read_returns(resume.returns_path(experiment))
    assert (first.since, first.to) == (second.since, second.to) == (13, 12)
    assert caplog.text.count("loss inf, gradient norm") == 20
    assert "from now on at 0.25 times the learning rate" in caplog.text
    after = weights(experiment, 32)
    assert all(value.isfinite().all() for value in after.values())
    start = read_checkpoint(experiment.init_checkpoint).state_dict
    assert any(not torch.equal(after[name], start[name]) for name in after)
    assert metrics(experiment)[-1]["step"] == 32
    assert resume.saved_steps(experiment)[-1] == 32


def test_after_three_returns_training_stops_with_what_was_seen(prepare, monkeypatch) -> None:
    experiment = prepare("hopeless", *BAD_FROM)
    poison = Poison(monkeypatch, lambda step: step >= 13)
    message = "not finite for the 4th time, now at 0.125 times the learning rate"
    with pytest.raises(ValueError, match=message) as error:
        train.train(experiment)
    text = str(error.value)
    assert text.count("from step 13, went back to step 12:") == 3
    assert text.count(", ".join(poison.ids[13])) == 4
    steps = resume.saved_steps(experiment)
    assert 12 in steps
    assert all(value.isfinite().all() for value in weights(experiment, steps[-1]).values())
    with pytest.raises(ValueError, match=message):  # and stays so
        train.train(experiment)


def test_a_killed_run_keeps_its_lower_rate(prepare, monkeypatch) -> None:
    one, two = (prepare(name, *BAD_FROM) for name in ("lower", "lowerkilled"))
    poison = Poison(monkeypatch, lambda step: step >= 13 and poison.left())
    train.train(one)
    poison.ids.clear()

    def die_late(experiment: Experiment, bad: faults.BadRun) -> None:
        back(experiment, bad)
        os.kill(os.getpid(), signal.SIGKILL)

    back = train.go_back
    assert in_child(two, lambda: setattr(train, "go_back", die_late)) == -signal.SIGKILL
    poison.wanted = lambda step: False
    train.train(two)
    assert_same(weights(one, 32), weights(two, 32))


def test_an_empty_memory_is_met_with_halves(prepare, undisturbed, monkeypatch, caplog) -> None:
    experiment = prepare("memory")
    inner = train.compute_losses

    def small(run: Any, batch: Any, *rest: Any) -> Any:
        if run.step == 2 and run.model.training and len(batch.ids) > 1:
            small.ids = batch.ids
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return inner(run, batch, *rest)

    monkeypatch.setattr(train, "compute_losses", small)
    with caplog.at_level("WARNING", logger="icetransfer"):
        train.train(experiment)
    assert "step 2: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB)" in caplog.text
    assert "trying again in 2 pieces" in caplog.text and "in 4 pieces" in caplog.text
    assert all(name in caplog.text for name in small.ids)


def gradients_of(run: Any, batch: Any) -> torch.Tensor:
    """Leaves the gradients of a batch in the run's model; returns the sums of its losses."""
    tier = train.draw_tier(run.settings, run.seed, run.step)
    for attempt in until_it_fits(run.step, [batch]):
        with attempt:
            sums = train.forward_backward(run, [batch], tier, attempt.pieces)
    return sums


def test_halves_give_the_gradients_of_the_whole(prepare, monkeypatch) -> None:
    run = resume.start_run(prepare("halves"), None)
    run.model.eval()  # no dropout
    batch = next(iter(run.loader))
    gradients = {}
    inner = train.compute_losses

    def limited(limit: int, *args: Any) -> Any:
        if len(args[1].ids) > limit:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return inner(*args)

    for limit in (100, 2, 1):
        monkeypatch.setattr(train, "compute_losses", functools.partial(limited, limit))
        sums = gradients_of(run, batch)
        gradients[limit] = torch.cat(
            [sums, *(p.grad.view(-1) for p in run.model.parameters() if p.grad is not None)]
        )
    for limit in (2, 1):
        torch.testing.assert_close(gradients[limit], gradients[100], rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(train, "compute_losses", functools.partial(limited, 0))
    with pytest.raises(ValueError, match="even with one utterance at a time") as error:
        gradients_of(run, batch)
    assert all(name in str(error.value) for name in batch.ids)


@pytest.mark.parametrize("damage", ["short", "changed", "empty"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(
    prepare, undisturbed: Experiment, caplog, damage: str
) -> None:
    experiment = prepare(f"damaged-{damage}")
    shutil.copytree(undisturbed.checkpoints_dir, experiment.checkpoints_dir)
    last = resume.checkpoint_path(experiment, 8)
    data = bytearray(last.read_bytes())
    if damage == "changed":
        data[len(data) // 2] ^= 1
    last.write_bytes(data[: {"short": len(data) - 1000, "changed": len(data), "empty": 0}[damage]])
    with pytest.raises(DamagedError, match="damaged"):
        read_checkpoint(last)
    with caplog.at_level("INFO", logger="icetransfer"):
        train.train(experiment)
    assert "checkpoint-8.pt.damaged; the run goes on from the one before" in caplog.text
    assert "going on from step 6" in caplog.text
    assert_same(weights(undisturbed), weights(experiment))


def test_a_full_disk_leaves_the_checkpoint_before(small_disk: Path, nano_dims) -> None:
    model = checkpoint.TransducerModel(nano_dims)
    path = small_disk / "checkpoint-1.pt"
    checkpoint.save_checkpoint(path, model)
    before = path.read_bytes()
    for name in ("checkpoint-2.pt", "checkpoint-1.pt"):
        with pytest.raises(OSError, match=r"could not be written.*MB are free.*Make room"):
            checkpoint.save_checkpoint(small_disk / name, model, more=torch.zeros(100_000))
    assert [file.name for file in small_disk.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_a_failing_write_leaves_the_checkpoint_before(prepare, undisturbed, monkeypatch) -> None:
    experiment = prepare("full")
    save = torch.save

    def full(content: dict[str, Any], path: Path) -> None:
        path.write_bytes(b"half")
        if content.get("batch_idx_train") == 6:
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 4")
        save(content, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"checkpoint-6\.pt could not be written.*unexpected pos"):
            train.train(experiment)
    assert resume.saved_steps(experiment) == [5]  # 3 would have gone after 6, and went before
    train.train(experiment)
    assert_same(weights(undisturbed), weights(experiment))


def test_on_a_full_disk_a_checkpoint_that_goes_anyway_makes_room(
    prepare, undisturbed, monkeypatch, caplog
) -> None:
    experiment = prepare("room")
    save = torch.save

    def needs_room(content: dict[str, Any], path: Path) -> None:
        if content.get("batch_idx_train") == 6 and resume.checkpoint_path(experiment, 3).is_file():
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", needs_room)
        train.train(experiment)
    assert re.search(
        r"checkpoint-6\.pt could not be .*MB are free.*steps \[3\],.*go now", caplog.text
    )
    assert resume.saved_steps(experiment) == [5, 6, 8]
    assert_same(weights(undisturbed), weights(experiment))


def test_changed_data_are_refused_with_the_difference(prepare, tone_data: Path) -> None:
    experiment = prepare("changed", "train.max_steps=3")
    train.train(experiment)
    resume.checkpoint_path(experiment, 3).unlink()
    manifest = tone_data / "manifests" / "tones_train_fbank.jsonl.gz"
    kept = manifest.read_bytes()
    cuts = features.read_manifest(manifest)
    try:
        features.write_manifest(cuts[::-1], manifest)  # other bytes, the same cuts
        train.train(experiment)
        changed = [cut for cut in cuts if cut.id != "train-03"]
        next(cut for cut in changed if cut.id == "train-05").supervisions[0].text = "zes"
        features.write_manifest(changed, manifest)
        with pytest.raises(ValueError, match="2 cuts differ") as error:
            resume.start_run(experiment, None)
    finally:
        manifest.write_bytes(kept)
    assert "train-03: [" in str(error.value) and "-> None" in str(error.value)
    assert "'zes']" in str(error.value) and f"--exp {experiment.dir}-2" in str(error.value)
    resume.start_run(experiment, None)  # what there was is whole


def test_cuts_whose_features_vanished_are_left_out_and_named(prepare, tone_data, caplog) -> None:
    experiment = prepare("vanished")
    (shard,) = (tone_data / "fbank" / "tones_train").glob("speed-0.9-*.npy")
    shard.rename(tone_data / "gone.npy")
    try:
        with caplog.at_level("WARNING", logger="icetransfer"):
            train.train(experiment)
    finally:
        (tone_data / "gone.npy").rename(shard)
    lost = re.findall(r"left out (\S+): cut (\S+): its features in .* cannot be read", caplog.text)
    assert lost and all(one == two and one.endswith("_sp0.9") for one, two in lost)
    assert metrics(experiment)[-2]["missing_cuts"] == len(lost)
    assert resume.start_run(experiment, resume.newest_checkpoint(experiment)).bad.missing_cuts > 0


def test_when_all_features_vanished_training_stops(prepare, tone_data: Path) -> None:
    experiment = prepare("allvanished", "train.max_steps=99")
    folder = tone_data / "fbank" / "tones_train"
    folder.rename(tone_data / "gone")
    try:
        with pytest.raises(ValueError, match=r"cut train-\S+: its features in .*is a disk gone"):
            train.train(experiment)
    finally:
        (tone_data / "gone").rename(folder)


def test_a_loading_process_that_dies_is_an_error_that_says_so(
    prepare, undisturbed, monkeypatch
) -> None:
    experiment = prepare("worker", "train.workers=1")
    collate = loader.Collator.__call__

    def die(self: Any, rows: Any, frames: int = 0) -> Any:
        if torch.utils.data.get_worker_info() and doomed in [row.cuts[0].id for row in rows]:
            os.kill(os.getpid(), signal.SIGKILL)
        return collate(self, rows, frames)

    batches = iter(resume.start_run(undisturbed, None).loader)
    doomed = [next(batches).ids for _ in range(7)][-1][0]
    with monkeypatch.context() as patch:
        patch.setattr(loader.Collator, "__call__", die)
        with pytest.raises(OSError, match=r"a process that loads data died.*lower train\.workers"):
            train.train(experiment)
    assert resume.saved_steps(experiment)[0] == 3
    train.train(experiment)
    assert_same(weights(undisturbed), weights(experiment))


def test_a_loading_process_that_dies_while_a_checkpoint_is_written(prepare, monkeypatch) -> None:
    """torch raises that from a signal handler, so inside of whatever the main process does."""

    def interrupted(*_: Any) -> None:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    experiment = prepare("worker-in-save")
    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(OSError, match=r"a process that loads data died.*lower train\.workers"):
        train.train(experiment)
