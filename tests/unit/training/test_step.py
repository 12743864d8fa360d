"""A step of training on tensors without memory: how many operations it takes, and that none waits.

Kernels are counted and not run.  Backward passes need a device that is there, so operations are
counted on a CPU that takes kernels, and copies between host and device in what comes before.
"""

import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from icetransfer import train
from icetransfer.model import gpu, scaling
from tests.kernels import kernels_of
from tests.scripts import load_script

layer = kernels_of("icetransfer.model.layer")
regularisers = kernels_of("icetransfer.model.kernels.regularisers")
common = kernels_of("icetransfer.model.kernels.common")
front_end = kernels_of("icetransfer.model.kernels.front_end")
of_training = kernels_of("icetransfer.training.kernels")
BENCH = Path(__file__).resolve().parents[3] / "benchmarks" / "bench_gpu.py"

# Kernels and operations of a step, regularisers left out; on an H200, with what cuBLAS adds and a
# tenth of the regularisers at work, 2034 and 2850 launches were counted.
BUDGETS = {"small": 1750, "large": 2350}

FREE = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "device",
    "empty", "empty_like", "empty_strided", "expand", "lift_fresh", "new_empty",
    "new_empty_strided", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t",
    "transpose", "unbind", "unfold", "unsqueeze", "view",
}  # fmt: skip
WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique"}


class Operations(TorchDispatchMode):
    """Counts operations; those on real tensors of the host are run, and are not the device's."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.blocking: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        device = kwargs.get("device") or torch.device("cpu")
        on_host = not any(isinstance(x, FakeTensor) for x in tensors)
        if on_host and (tensors or name == "empty" or "device" in kwargs) and device.type == "cpu":
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        moved = name == "_to_copy" and "device" in kwargs and tensors[0].device.type != device.type
        if moved and not kwargs.get("non_blocking"):
            self.blocking.append(f"{name} of {tuple(tensors[0].shape)} to {device}")
        if name in WAITS:
            self.blocking.append(name)
        if name not in FREE:
            self.counts[name] += 1
        return func(*args, **kwargs)


@pytest.fixture
def bench():
    return load_script(BENCH)


@pytest.fixture
def operations(monkeypatch):
    """The counter, which also counts kernels."""
    mode = Operations()

    def launch(kernel, grid, *args, **settings) -> None:
        mode.counts[kernel.__name__] += 1

    for name, module in list(sys.modules.items()):
        if name.startswith("icetransfer.") and hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", launch)

    def mm32(a, b):
        mode.counts["mm32"] += 1
        return a.new_empty(a.size(0), b.size(1), dtype=torch.float32)

    for module in (layer, regularisers):
        monkeypatch.setattr(module, "mm32", mm32)
    monkeypatch.setattr(
        gpu, "takes_kernels", lambda x: isinstance(x, FakeTensor) and x.dtype in gpu.DTYPES
    )
    common.counters.cache_clear()
    common._scratch.clear()
    yield mode
    common.counters.cache_clear()
    common._scratch.clear()


def fake(batch, device: str):
    """The batch with features and tokens without memory, on the device; lengths as they are."""
    features = torch.empty(batch.features.shape, device=device)
    tokens = torch.empty(batch.tokens.shape, dtype=torch.int64, device=device)
    return replace(batch, features=features, tokens=tokens)


def make_run(bench, size: str, device: str):
    torch.set_default_device(device)
    try:
        return bench.make_run(bench.MODELS[size], "bf16", device)
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("size", BUDGETS)
def test_budget_of_operations(size, bench, operations, monkeypatch) -> None:
    monkeypatch.setattr(scaling, "fires", lambda prob: False)
    batch = bench.draw_batch(300, random.Random(0), 500)
    with FakeTensorMode(allow_non_fake_inputs=True):
        run = make_run(bench, size, "cpu")
        own = fake(batch, "cpu")
        with operations:
            for _ in range(2):  # the first step makes what later ones have
                operations.counts.clear()
                bench.step(run, own)
    assert operations.blocking == []
    total = sum(operations.counts.values())
    assert 0.7 * BUDGETS[size] < total < BUDGETS[size], operations.counts.most_common(30)


def test_a_balancer_or_whitener_takes_few_operations(bench, operations, monkeypatch) -> None:
    batch = bench.draw_batch(100, random.Random(0), 500)
    totals = []
    for fires in (False, True):
        monkeypatch.setattr(scaling, "fires", lambda prob, fires=fires: fires)
        operations.counts.clear()
        with FakeTensorMode(allow_non_fake_inputs=True):
            run, own = make_run(bench, "small", "cpu"), fake(batch, "cpu")
            with operations:
                bench.step(run, own)
        totals.append(sum(operations.counts.values()))
    modules = list(run.model.modules())
    count = sum(isinstance(m, scaling.Balancer | scaling.Whiten) for m in modules)
    assert (totals[1] - totals[0]) / count < 8


def test_nothing_waits_for_the_device(bench, operations, monkeypatch) -> None:
    """Forward passes of a step and of the dev loss, on a device that is not the host."""
    monkeypatch.setattr(scaling, "fires", lambda prob: False)
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: None)

    def ctc_loss(log_probs, tokens, lens, token_lens, **_):  # torch's has no form without memory
        assert lens.device.type == token_lens.device.type == "cpu"  # else it asks the device
        return log_probs.sum()

    monkeypatch.setattr(torch.nn.functional, "ctc_loss", ctc_loss)
    batch = bench.draw_batch(60, random.Random(0), 500)
    with FakeTensorMode(allow_non_fake_inputs=True):
        run = make_run(bench, "tiny", "cuda")
        assert next(run.model.parameters()).device.type == "cuda"
        own = fake(batch, "cuda")
        with operations:
            sums = train.forward_backward(run, [own], (16, 128))
            losses, out, out_lens = train.compute_losses(run, own, own.features, 16, 128)
            heard = train.moments(out, out_lens)
    assert sums.device.type == losses.simple.device.type == heard.device.type == "cuda"
    assert operations.blocking == []
    assert operations.counts["_warp_kernel"] == operations.counts["_mask_kernel"] == 1
