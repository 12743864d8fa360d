"""The Triton kernels of loss, optimiser and SpecAugment against their plain
forms, in the interpreter or on a GPU, with poisoned outputs."""

import random

import numpy as np
import pytest
import torch
from lhotse.dataset.signal_transforms import SpecAugment
from torch import Tensor

from icetransfer.data.augment import augment as augment_by_lhotse
from icetransfer.experiment import seed_everything
from icetransfer.model import gpu
from icetransfer.training import rnnt
from icetransfer.training.augment import augment
from tests.kernels import DEVICE, gradients, kernels_of, poisoned

kernels = kernels_of("icetransfer.training.kernels")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    with poisoned():
        yield


def arcs(batch: int, symbols: int, frames: int) -> tuple[Tensor, Tensor]:
    px = torch.randn(batch, symbols, frames, device=DEVICE) - 2
    return px, torch.randn(batch, symbols + 1, frames, device=DEVICE) - 1


def boundaries(*rows: tuple[int, int]) -> Tensor:
    return torch.tensor([[0, 0, *row] for row in rows], device=DEVICE)


CASES = {
    "one of each": (1, 1, [(1, 1)]),
    "no symbol": (3, 5, [(0, 5), (3, 2), (2, 5)]),
    "more symbols than frames": (9, 4, [(9, 4), (9, 1), (1, 3)]),
    "long": (40, 60, [(40, 60), (7, 60), (33, 20)]),
}


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_lattice(case, pruned) -> None:
    symbols, frames, rows = CASES[case]
    px, py = arcs(len(rows), symbols, frames)
    boundary = boundaries(*rows)
    if pruned:  # arcs outside of a band cannot be taken, and the layout is another one
        place = torch.arange(symbols, device=DEVICE).view(1, -1, 1)
        middle = torch.arange(frames, device=DEVICE) * symbols / frames
        px = px.masked_fill((place - middle).abs() > 4, float("-inf"))
        px = px.transpose(1, 2).contiguous().transpose(1, 2)
        py = py.transpose(1, 2).contiguous().transpose(1, 2)
    scores, alpha = kernels.lattice_scores(px, py, boundary)
    px_grad, py_grad = kernels.lattice_occupations(px, py, boundary, scores, alpha)
    expected, px_expected, py_expected = rnnt._LatticeScore.apply(
        px.double(), py.double(), boundary, True, True
    )
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-5)
    within = torch.arange(frames, device=DEVICE) < boundary[:, 3].view(-1, 1, 1)
    torch.testing.assert_close(px_grad.double(), px_expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(py_grad.double(), py_expected * within, rtol=1e-4, atol=1e-6)


def test_no_path() -> None:
    px, py = arcs(2, 3, 4)
    px[0, 1] = float("-inf")  # the second symbol can never be emitted
    boundary = boundaries((3, 4), (3, 4))
    scores, alpha = kernels.lattice_scores(px, py, boundary)
    px_grad, py_grad = kernels.lattice_occupations(px, py, boundary, scores, alpha)
    assert scores[0] == float("-inf") and scores[1].isfinite()
    assert not px_grad[0].any() and not py_grad[0].any()
    assert px_grad[1].sum().item() == pytest.approx(3, rel=1e-5)
    assert py_grad[1].sum().item() == pytest.approx(4, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab", [3, 64, 501])
def test_pick_log_probs(dtype, vocab) -> None:
    logits = (4 * torch.randn(2, 3, 4, vocab)).to(DEVICE, dtype).requires_grad_()
    targets = torch.randint(vocab, (2, 3, 4), device=DEVICE)
    targets[0, 0] = 0  # the blank itself

    def both(function):
        return lambda logits: torch.stack(function(logits, targets, 0))

    out, (grad,) = gradients(both(kernels.pick_log_probs), [logits])
    expected, (wanted,) = gradients(both(rnnt._PickLogProbs.apply), [logits], torch.float64)
    assert out.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    bound = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert (grad.double() - wanted).norm() < bound * wanted.norm()


@pytest.mark.parametrize("frames", [(230, 180, 40), (90,)])
def test_spec_augment_is_that_of_lhotse(frames, monkeypatch) -> None:
    transform = SpecAugment(
        time_warp_factor=20, num_feature_masks=2, num_frame_masks=3, frames_mask_size=15, p=0.8
    )
    lengths = torch.tensor(frames)
    features = torch.randn(len(frames), 240 if len(frames) > 1 else 90, 80)
    changed = 0
    for seed in range(4):
        seed_everything(seed)
        expected = augment_by_lhotse(transform, features, lengths)
        drawn = (random.random(), float(np.random.rand()), float(torch.rand(())))
        monkeypatch.setattr(gpu, "takes_kernels", lambda x: True)
        seed_everything(seed)
        out = augment(transform, features.to(DEVICE), lengths)
        assert drawn == (random.random(), float(np.random.rand()), float(torch.rand(())))
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-4, atol=2e-5)
        changed += not torch.equal(expected, features)
    assert changed


def test_sums_and_values_of_segments() -> None:
    sizes = [1, 7, 5000, 3, 4096, 1]
    segments = kernels.Segments(sizes, DEVICE)
    a, b = torch.randn(2, sum(sizes), device=DEVICE)
    parts = zip(a.double().split(sizes), b.double().split(sizes), strict=True)
    expected = torch.stack([x @ y for x, y in parts])
    torch.testing.assert_close(segments.dot(a, b).double(), expected, rtol=1e-4, atol=1e-4)
    values = torch.randn(len(sizes), device=DEVICE)
    spread = segments.spread(values)
    assert torch.equal(spread, values.repeat_interleave(torch.tensor(sizes, device=DEVICE)))
