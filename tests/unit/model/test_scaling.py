"""Activations and norms against their definitions, and what the regularisers do to gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from icetransfer.model.scaling import (
    Balancer,
    BiasNorm,
    ScheduledFloat,
    SwooshL,
    SwooshR,
    Whiten,
    keep_inside,
    set_batch_count,
    time_shared_dropout,
    whitening_measure,
)

CONSTANTS = {SwooshR: (1.0, 0.313261687), SwooshL: (4.0, 0.035)}


@pytest.mark.parametrize("kind", [SwooshR, SwooshL])
@pytest.mark.parametrize("layout", ["rows", "image", "channels_last", "strided", "long"])
def test_swoosh(kind: type[SwooshR] | type[SwooshL], layout: str) -> None:
    shift, offset = CONSTANTS[kind]
    x = torch.linspace(-200.0, 200.0, 4001).repeat(2)[: 2 * 4 * 5 * 100].view(2, 4, 5, 100)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        x = x.transpose(1, 3)
    elif layout == "rows":
        x = x.reshape(40, 100)
    elif layout == "long":  # more than one block
        x = torch.linspace(-30.0, 30.0, 300_001)
    x.requires_grad_()
    out = kind()(x)
    weight = torch.linspace(-1.0, 1.0, x.numel()).view(x.shape)
    (grad,) = torch.autograd.grad(out, x, weight)
    exact = x.detach().double().requires_grad_()
    expected = F.softplus(exact - shift) - 0.08 * exact - offset
    (expected_grad,) = torch.autograd.grad(expected, exact, weight.double())
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(grad.double(), expected_grad, atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(kind()(x), out, atol=0, rtol=0)
    traced = torch.jit.trace(kind(), x.detach(), check_trace=False)
    torch.testing.assert_close(traced(x.detach()), out.detach(), atol=1e-5, rtol=1e-6)


def test_swoosh_of_nothing() -> None:
    assert SwooshR()(torch.empty(0, 3)).shape == (0, 3)


def test_bias_norm_gradients() -> None:
    norm = BiasNorm(6).double().eval()
    with torch.no_grad():
        norm.bias.normal_()
        norm.log_scale.fill_(0.3)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    expected = x / (x - norm.bias).square().mean(-1, keepdim=True).sqrt() * math.exp(0.3)
    torch.testing.assert_close(norm(x), expected)
    assert torch.autograd.gradcheck(
        lambda x, bias, scale: torch.func.functional_call(
            norm, {"bias": bias, "log_scale": scale}, (x,)
        ),
        (x, norm.bias, norm.log_scale),
    )


def test_schedule() -> None:
    value = ScheduledFloat((0.0, 0.3), (100.0, 0.1), (200.0, 0.0))
    seen = []
    for count in (0, 50, 100, 150, 1000):
        set_batch_count(value, count)
        seen.append(value.value)
    assert seen == pytest.approx([0.3, 0.2, 0.1, 0.05, 0.0])


def test_keep_inside_turns_gradients_round() -> None:
    x = torch.tensor([0.1, 0.1, 0.5, 0.9, 0.9], requires_grad=True)
    out = keep_inside(x, 0.2, 0.8)
    assert torch.equal(out, x)
    out.backward(torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0]))
    assert x.grad is not None
    assert x.grad.tolist() == [-1.0, -1.0, 1.0, 1.0, 1.0]


def descend(module: torch.nn.Module, x: Tensor, steps: int, rate: float) -> Tensor:
    """Moves `x` against the gradient that the module adds to a noise of mean zero."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = x.detach().requires_grad_()
        noise = torch.randn(x.shape, generator=generator)
        (grad,) = torch.autograd.grad(module(x), x, noise)
        x = x - rate * (grad - noise)
    return x.detach()


def always(balancer: Balancer) -> Balancer:
    balancer.prob = ScheduledFloat((0.0, 1.0))
    return balancer.train()


@pytest.mark.parametrize("channel_dim", [-1, 1])
def test_balancer_moves_statistics_into_range(channel_dim: int) -> None:
    balancer = always(Balancer(0.3, 0.7, 0.5, 2.0, channel_dim=channel_dim))
    noise = torch.randn(500, 4, generator=torch.Generator().manual_seed(1))
    x = noise * torch.tensor([1.0, 1.0, 0.1, 5.0]) + torch.tensor([2.0, -2.0, 0.0, 0.0])
    shape = (50, 10, 4) if channel_dim == -1 else (50, 4, 10)
    batch = x.view(50, 10, 4) if channel_dim == -1 else x.view(50, 10, 4).transpose(1, 2)
    assert batch.shape == shape
    moved = descend(balancer, batch, steps=60, rate=1.0)
    moved = (moved if channel_dim == -1 else moved.transpose(1, 2)).reshape(500, 4)
    before, after = (x > 0).float().mean(0), (moved > 0).float().mean(0)
    assert after[0] < before[0]
    assert after[1] > before[1]
    assert moved.abs().mean(0)[2] > 2 * x.abs().mean(0)[2]
    assert moved.abs().mean(0)[3] < x.abs().mean(0)[3] - 0.5


def test_whiten_lowers_its_measure() -> None:
    whiten = Whiten(limit=1.5, prob=1.0).train()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator) * torch.tensor([5.0, 1, 1, 1, 1, 1])
    assert whitening_measure(torch.randn(5000, 6, generator=generator)).item() < 1.02
    before = whitening_measure(x).item()
    assert before > 2.5
    assert whitening_measure(descend(whiten, x, 50, 1.0)).item() < 0.9 * before


@pytest.mark.parametrize("module", [always(Balancer(0.9, 1.0, 5.0, 9.0)), Whiten(1.0, prob=1.0)])
def test_regularisers_are_the_identity_forwards_and_off_in_evaluation(
    module: Balancer | Whiten,
) -> None:
    x = torch.randn(4, 5, 6, requires_grad=True)
    weight = torch.randn(4, 5, 6)
    module.train()
    assert torch.equal(module(x), x)
    (grad,) = torch.autograd.grad(module(x), x, weight)
    assert grad.isfinite().all()
    assert not torch.equal(grad, weight)
    (zero,) = torch.autograd.grad(module(x), x, torch.zeros_like(x))
    assert not zero.any()
    module.eval()
    assert module(x) is x


def test_time_shared_dropout() -> None:
    torch.manual_seed(0)
    x = torch.ones(64, 5, 50)
    out = time_shared_dropout(x, 0.25)
    assert torch.equal(out, out[:, :1].expand_as(out))
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert out.mean().item() == pytest.approx(1.0, abs=0.05)
    assert time_shared_dropout(x, 0.0) is x
