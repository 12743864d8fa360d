"""The kernels of the front end against their plain forms, in Triton's interpreter or on a GPU.

Outputs are poisoned: torch fills what it allocates with NaN, so that what no program wrote shows.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from icetransfer.model import scaling
from icetransfer.model.swoosh import SWOOSH_L, SWOOSH_R, swoosh_and_slope
from tests.kernels import DEVICE, few_programs, gradients, kernels_of, poisoned

kernels = kernels_of("icetransfer.model.kernels.front_end")

# The interpreter computes, and does not store, what lies outside of a tensor.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

HALF = [torch.bfloat16, torch.float16]
BOUNDS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape)).to(DEVICE, dtype).requires_grad_()


def error(given: Tensor, expected: Tensor) -> float:
    expected = expected.detach().double()
    return float((given.detach().double() - expected).norm() / expected.norm())


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(0)
    few_programs(monkeypatch)
    with poisoned():
        yield


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("form", [SWOOSH_L, SWOOSH_R])
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (2, 3, 11, 5)])
def test_swoosh(dtype, form, shape) -> None:
    x = draw(*shape, dtype=dtype, scale=30.0)
    if x.dim() == 4:  # channels-last images stay so
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    out = kernels.swoosh(x, *form)
    grad = torch.randn_like(out)
    (of_x,) = torch.autograd.grad(out, x, grad)
    expected, slope = swoosh_and_slope(x.detach().double(), *form, with_slope=True)
    assert out.stride() == x.stride() == of_x.stride()
    assert error(out, expected) < BOUNDS[dtype]
    assert error(of_x, grad.double() * slope) < BOUNDS[dtype]


def test_swoosh_where_exp_would_overflow() -> None:
    x = torch.tensor([-6e4, -100.0, 100.0, 6e4], device=DEVICE, dtype=torch.float16)
    out = kernels.swoosh(x.requires_grad_(), *SWOOSH_L)
    (of_x,) = torch.autograd.grad(out.float().sum(), x)
    expected = [4.8e3 - 0.035, 8 - 0.035, 92 - 4.035, 55200 - 4.035]
    assert out.tolist() == pytest.approx(expected, rel=1e-3)
    assert of_x.tolist() == pytest.approx([-0.08, -0.08, 0.92, 0.92], rel=1e-3)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(1, 1, 5), (3, 100, 48), (2, 9, 130)])
def test_bias_norm(dtype, shape) -> None:
    inputs = [draw(*shape, dtype=dtype), draw(shape[-1]), draw()]
    out, grads = gradients(kernels.bias_norm, inputs)
    expected, expected_grads = gradients(scaling._BiasNorm.apply, inputs, torch.float64)
    assert out.dtype == torch.float32
    assert error(out, expected) < BOUNDS[dtype]
    for given, wanted in zip(grads, expected_grads, strict=True):
        assert error(given, wanted) < 2 * BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(2, 3, 11, 5), (1, 70, 4, 19), (3, 1, 1, 1)])
def test_depthwise_conv2d(dtype, shape) -> None:
    image = draw(*shape, dtype=dtype).detach().to(memory_format=torch.channels_last)
    inputs = [image.requires_grad_(), draw(shape[1], 1, 7, 7)]

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, padding=3, groups=shape[1])

    out, grads = gradients(kernels.depthwise_conv2d, inputs)
    expected, expected_grads = gradients(plain, inputs, torch.float64)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert error(out, expected) < BOUNDS[dtype]
    for given, wanted in zip(grads, expected_grads, strict=True):
        assert error(given, wanted) < 2 * BOUNDS[dtype]
