"""Several processes against one, over gloo."""

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from icetransfer import train
from icetransfer.data.blocks import hold_blocks, open_blocks, training_data
from icetransfer.data.loader import Collator, Order, Shares, TrainLoader
from icetransfer.data.tokenizer import Tokenizer
from icetransfer.experiment import RUN_AGAIN, Experiment
from icetransfer.model.checkpoint import read_checkpoint
from icetransfer.model.transducer import TransducerModel
from icetransfer.training import distributed, resume
from icetransfer.training.distributed import World

REPO = Path(train.__file__).parent.parent
# Two processes with 4 s, or one with 8 s, see the same steps.
SETTINGS = (
    *("train.max_steps=20", "train.checkpoint_every=20", "train.spec_augment.enabled=false"),
    "train.lr_scale={encoder_embed: 1, encoder: 1, joiner: 1, simple_am_proj: 1, "
    "simple_lm_proj: 1, ctc_output: 1}",
    *("train.schedule.warmup_steps=100", "train.loss_warmup_steps=60"),
)


def free_port() -> str:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


def in_processes(count: int, run: Callable[[], None]) -> list[int | None]:
    """Runs a function in forked processes that find each other; returns their exit codes."""
    port = free_port()

    def work(rank: int) -> None:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        run()

    context = multiprocessing.get_context("fork")
    children = [context.Process(target=work, args=(rank,)) for rank in range(count)]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=120)
    return [child.exitcode for child in children]


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes dropout and the regularisers' draws out, and keeps the gradients of each first step."""
    quiet = TransducerModel.train
    monkeypatch.setattr(TransducerModel, "train", lambda self, mode=True: quiet(self, False))
    inner = train.train_step

    def spy(run: Any, *rest: Any) -> torch.Tensor:
        numbers = inner(run, *rest)
        if run.step == 1:
            kept = {n: p.grad for n, p in run.model.named_parameters() if p.grad is not None}
            torch.save(kept | {"numbers": numbers}, run.experiment.dir / f"{run.world.rank}.pt")
        return numbers

    monkeypatch.setattr(train, "train_step", spy)


def gradients(experiment: Experiment, rank: int = 0) -> dict[str, torch.Tensor]:
    return torch.load(experiment.dir / f"{rank}.pt")


def difference(one: Experiment, two: Experiment) -> float:
    """Of the weights after the last step, relative to how far they have moved."""
    start = read_checkpoint(one.init_checkpoint).state_dict
    ends = [read_checkpoint(resume.checkpoint_path(e, 20)).state_dict for e in (one, two)]
    apart = torch.cat([(ends[0][n] - ends[1][n]).flatten() for n in start])
    moved = torch.cat([(ends[0][n] - start[n]).flatten() for n in start])
    return float(apart.norm() / moved.norm())


@pytest.mark.usefixtures("spied")
def test_two_processes_are_one_with_twice_the_batch(prepare) -> None:
    one = prepare("one", *SETTINGS, "train.batch_seconds=8")
    two = prepare("two", *SETTINGS, "train.batch_seconds=4")
    summed = prepare("accumulated", *SETTINGS, "train.batch_seconds=4", "train.accumulate=2")
    train.train(one)
    train.train(summed)
    assert in_processes(2, lambda: train.train(two)) == [0, 0]
    expected = gradients(one)
    for experiment, rank in ((two, 0), (two, 1), (summed, 0)):
        found = gradients(experiment, rank)
        for name, gradient in expected.items():
            error = (found[name] - gradient).norm() / (gradient.norm() + 1e-6)
            assert error < 1e-4, (name, error)
    assert torch.equal(gradients(two, 0)["numbers"], gradients(two, 1)["numbers"])
    assert difference(one, two) < 0.01
    assert difference(one, summed) < 0.01
    assert resume.saved_steps(two) == [14, 20]


def test_shares_deal_a_step_out(prepare) -> None:
    experiment = prepare("shares")
    tokenizer = Tokenizer(experiment.lang_dir / "bpe.model")
    hold_blocks(experiment)
    order, collate = (
        Order(open_blocks(training_data(experiment)), 40, seed=1),
        Collator(tokenizer),
    )
    whole = iter(TrainLoader([order], collate))
    dealt = [
        iter(TrainLoader([order], collate, Shares(4, mine), workers))
        for mine, workers in (((0, 2), 0), ((1, 3), 2))
    ]
    for _ in range(8):  # two epochs, whose last steps are small
        batch = next(whole)
        shares = [next(loader) for _ in range(2) for loader in dealt]
        assert sorted(name for share in shares for name in share.ids) == sorted(batch.ids)
        assert {share.features.shape[1] for share in shares} == {batch.features.shape[1]}
        assert max(len(s.ids) for s in shares) - min(len(s.ids) for s in shares) <= 1
    assert dealt[0].gi_frame.f_locals["self"].state_dict()["shares"] == 4


@pytest.mark.usefixtures("spied")
def test_a_process_may_have_nothing_to_do(prepare) -> None:
    settings = (*SETTINGS, "train.max_steps=3", "train.checkpoint_every=3")
    one = prepare("single", *settings, "train.batch_seconds=0.1")
    two = prepare("idle", *settings, "train.batch_seconds=0.05")
    tokenizer = Tokenizer(one.lang_dir / "bpe.model")
    hold_blocks(one)
    order = Order(open_blocks(training_data(one)), 0.1, seed=1)
    second = iter(TrainLoader([order], Collator(tokenizer), Shares(2, (1,))))
    assert any(not next(second).ids for _ in range(3))
    train.train(one)
    assert in_processes(2, lambda: train.train(two)) == [0, 0]
    for name, gradient in gradients(one).items():
        torch.testing.assert_close(gradients(two, 1)[name], gradient, rtol=1e-3, atol=1e-3)


def test_bad_numbers_in_one_process_are_skipped_in_all(prepare, monkeypatch) -> None:
    experiment = prepare("nantwo", "train.checkpoint_every=1", "train.keep_checkpoints=9")
    inner = train.compute_losses

    def poisoned(run: Any, batch: Any, features: Any, *tier: int) -> Any:
        if run.step == 4 and run.world.rank == 1 and run.model.training:
            features = features * torch.nan
        return inner(run, batch, features, *tier)

    monkeypatch.setattr(train, "compute_losses", poisoned)
    assert in_processes(2, lambda: train.train(experiment)) == [0, 0]
    states = [
        read_checkpoint(resume.checkpoint_path(experiment, step)).state_dict for step in (3, 4, 8)
    ]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name])
        assert states[2][name].isfinite().all()


def test_a_signal_to_one_process_stops_all_and_the_run_goes_on(prepare, monkeypatch) -> None:
    undisturbed, stopped = (prepare(name) for name in ("both", "bothstopped"))
    assert in_processes(2, lambda: train.train(undisturbed)) == [0, 0]

    def signalled(run: Any, *rest: Any) -> torch.Tensor:
        if run.step == 3 and run.world.rank == 1:  # before the fourth
            os.kill(os.getpid(), signal.SIGUSR1)
        return inner(run, *rest)

    inner = train.train_step
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", signalled)
        assert in_processes(2, lambda: train.train(stopped)) == [RUN_AGAIN] * 2
    assert resume.saved_steps(stopped) == [3, 4]
    assert in_processes(2, lambda: train.train(stopped)) == [0, 0]
    one, two = (
        read_checkpoint(resume.checkpoint_path(experiment, 8)).state_dict
        for experiment in (undisturbed, stopped)
    )
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def test_torchrun_starts_the_stage(prepare) -> None:
    experiment = prepare("torchrun", "train.max_steps=2")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "icetransfer.train", "--exp", experiment.dir],
        env=os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stderr and done.stderr.count("parameters,") == 1
    assert resume.saved_steps(experiment) == [1, 2]


def test_buckets_do_not_change_the_sums(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def reduce() -> None:
        parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 4, 5, 2)]
        with distributed.join_world() as world:
            for number, parameter in enumerate(parameters[:3]):
                parameter.grad = torch.full_like(parameter, number + 10.0 * world.rank)
            sums = distributed.GradientSums(world, parameters)
            numbers = sums.finish(torch.tensor([1.0, world.rank]))
            assert numbers.tolist() == [3.0, 3.0]
            assert [p.grad.unique().tolist() for p in parameters] == [[30], [33], [36], [0]]
            assert world.share(world.rank) == 0
            assert world.gather(world.rank) == [0, 1, 2]
            assert world.any(world.rank == 2) and not world.any(False)

    monkeypatch.setattr(distributed, "BUCKET", 7)
    assert in_processes(3, reduce) == [0, 0, 0]


class Layers(torch.nn.Module):
    """Some layers, one of which can fail on its way back, and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.ones(3))
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(5))
        self.fails = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x).tanh()
            if number == 1:
                x.register_hook(self._fail)
        return x.square().sum()

    def _fail(self, grad: torch.Tensor) -> None:
        if self.fails:
            raise MemoryError


def test_sums_leave_while_the_backward_pass_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def reduce() -> None:
        torch.manual_seed(0)
        model, x = Layers(), torch.randn(4, 3, 6, 4)  # steps, processes, frames, channels
        with distributed.join_world() as world:
            sums = distributed.GradientSums(world, model.parameters())
            early: list[int] = []
            inner = sums._send
            monkeypatch.setattr(sums, "_send", lambda: (early.append(sums._is_open), inner())[1])
            for step in range(4):
                early.clear()
                model.zero_grad()
                shares = x[step, :2] if step == 2 else x[step]
                whole = torch.stack([model(share) for share in shares]).sum()
                expected = torch.autograd.grad(whole, list(model.layers.parameters()))
                model.fails = step == 3 and world.rank == 1
                if world.rank < len(shares):  # else there is nothing to do
                    try:
                        with sums.last_backward():
                            model(x[step, world.rank]).backward()
                    except MemoryError:  # as for lack of memory: once more, in pieces
                        assert any(early)
                        model.fails = False
                        model.zero_grad()
                        for piece in x[step, world.rank].split(2):
                            model(piece).backward()
                numbers = sums.finish(torch.tensor([float(world.rank)]))
                assert numbers.tolist() == [3.0]
                for parameter, grad in zip(model.layers.parameters(), expected, strict=True):
                    torch.testing.assert_close(parameter.grad, grad)
                assert not model.unused.grad.any()
                assert len(early) == len(sums._buckets) > 3
                if step == 1:  # all but that of what is not used, which is known by now
                    assert all(early)

    monkeypatch.setattr(distributed, "BUCKET", 20)
    assert in_processes(3, reduce) == [0, 0, 0]


@pytest.mark.usefixtures("spied")
def test_three_processes_with_uneven_shares(prepare) -> None:
    settings = (*SETTINGS, "train.max_steps=3", "train.checkpoint_every=3")
    one = prepare("whole", *settings, "train.batch_seconds=12")
    three = prepare("thirds", *settings, "train.batch_seconds=4")
    train.train(one)
    assert in_processes(3, lambda: train.train(three)) == [0, 0, 0]
    for name, gradient in gradients(one).items():
        for rank in range(3):
            error = (gradients(three, rank)[name] - gradient).norm() / (gradient.norm() + 1e-6)
            assert error < 1e-4, (name, error)


def test_a_process_that_dies_ends_the_others(prepare, monkeypatch) -> None:
    experiment = prepare("dies")
    inner = train.train_step

    def dying(run: Any, *rest: Any) -> torch.Tensor:
        if run.step == 2 and run.world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(run, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", dying)
        codes = in_processes(2, lambda: train.train(experiment))
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, None)
    assert in_processes(2, lambda: train.train(experiment)) == [0, 0]
    assert resume.saved_steps(experiment)[-1] == 8


LAUNCHER = """
import subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
print(rank.stdout.readline().strip(), flush=True)
time.sleep(60)
"""
RANK = """
import os, time
from icetransfer.stage.parent import end_with_parent
end_with_parent()
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="what Linux does for processes")
def test_a_process_ends_with_its_launcher() -> None:
    command = [sys.executable, "-c", LAUNCHER, RANK]
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert launcher.stdout is not None
    status = Path("/proc", launcher.stdout.readline().strip(), "status")
    assert status.exists()
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 20
    with contextlib.suppress(OSError):  # it is gone, else it may be left as a zombie
        while "\nState:\tZ" not in status.read_text():
            assert time.monotonic() < deadline, "it goes on without its launcher"
            time.sleep(0.05)


def test_srun_tells_who_is_who(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "$@" >&2\nprintf "gpu7\\ngpu8\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    slurm = {
        "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NODELIST": "gpu[7-8]", "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1", "SLURM_JOB_ID": "41234",
    }  # fmt: skip
    assert distributed.slurm_environment(slurm) == {
        "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu7",
        "MASTER_PORT": "21234",
    }  # fmt: skip
    assert distributed.slurm_environment(slurm | {"WORLD_SIZE": "2"}) is None  # torchrun below srun
    assert distributed.slurm_environment({"SLURM_STEP_NUM_TASKS": "1"}) is None
    assert World().is_writer and World().size == 1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_about_the_same(prepare, precision: str) -> None:
    settings = ("train.max_steps=6", "train.log_every=6")
    exact, half = (
        prepare("fp32", *settings),
        prepare(precision, *settings, f"train.precision={precision}"),
    )
    train.train(exact)
    train.train(half)
    state = read_checkpoint(resume.checkpoint_path(half, 6))
    assert {value.dtype for value in state.state_dict.values()} == {torch.float32}
    assert bool(state.extra["scaler"]) == (precision == "fp16")
    start = read_checkpoint(exact.init_checkpoint).state_dict
    name = "encoder_embed.out.weight"
    moves = [
        read_checkpoint(resume.checkpoint_path(e, 6)).state_dict[name] - start[name]
        for e in (exact, half)
    ]
    assert torch.nn.functional.cosine_similarity(*(m.flatten() for m in moves), dim=0) > 0.9


def test_precision_is_chosen_by_the_device() -> None:
    cpu = torch.device("cpu")
    assert resume.choose_precision("auto", cpu) == torch.float32
    assert resume.choose_precision("bf16", cpu) == torch.bfloat16


def test_when_the_writer_fails_all_processes_leave_with_an_error(prepare, capfd) -> None:
    experiment = prepare("writerfails")
    save = resume.save_checkpoint

    def full(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name == "checkpoint-5.pt":
            raise OSError("checkpoint-5.pt could not be written: no space left")
        save(path, *args, **kwargs)

    def run() -> None:
        resume.save_checkpoint = full  # type: ignore[assignment]
        train.train(experiment)

    assert in_processes(2, run) == [1, 1]
    said = capfd.readouterr().err
    assert "the process that writes the files has failed (OSError: checkpoint-5.pt" in said
    assert resume.saved_steps(experiment) == [3]
