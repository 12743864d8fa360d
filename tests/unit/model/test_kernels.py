"""The Triton kernels of the model against their plain forms, in Triton's interpreter or on a GPU.

Outputs are poisoned: torch fills what it allocates with NaN, so that what no program wrote shows.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from icetransfer.model import attention, scaling, zipformer
from icetransfer.model.swoosh import SWOOSH_L, SWOOSH_R, swoosh_and_slope
from tests.kernels import DEVICE, gradients, kernels_of, poisoned

kernels = kernels_of("icetransfer.model.kernels")

HALF = [torch.bfloat16, torch.float16]
BOUNDS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape)).to(DEVICE, dtype).requires_grad_()


def error(given: Tensor, expected: Tensor) -> float:
    return float((given.detach().double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(0)
    if DEVICE.type == "cpu":  # the interpreter takes a millisecond for each program
        monkeypatch.setattr(kernels, "SPLITS", 3)
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
def test_glu(dtype) -> None:
    x = draw(3, 7, 2 * 5, dtype=dtype)
    padding = torch.arange(7, device=DEVICE) >= torch.tensor([[7], [4], [1]], device=DEVICE)

    def plain(x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return (value * torch.sigmoid(gate)).masked_fill(padding.unsqueeze(-1), 0.0)

    out, (of_x,) = gradients(lambda x: kernels.glu(x, padding), [x])
    expected, (of_x_expected,) = gradients(plain, [x], torch.float64)
    assert error(out, expected) < BOUNDS[dtype]
    assert error(of_x, of_x_expected) < BOUNDS[dtype]


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
@pytest.mark.parametrize(("queries", "left"), [(1, 0), (13, 0), (33, 0), (8, 16)])
def test_capped_softmax(dtype, queries, left) -> None:
    keys = queries + left
    content = draw(2, 3, queries, keys, dtype=dtype, scale=3.0)
    position = draw(2, 3, queries, keys + queries - 1, dtype=dtype)
    hidden = torch.rand(3, queries, keys, device=DEVICE) < 0.3
    hidden[1, 0] = True  # every key of a query
    caps = attention.score_caps(hidden, torch.float32)

    def plain(content: Tensor, position: Tensor) -> Tensor:
        return attention._CappedSoftmax.apply(content, position, caps.to(content.dtype))

    def kernel(content: Tensor, position: Tensor) -> Tensor:
        return kernels.capped_softmax(content, position, caps, attention.MASKED_SCORE)

    out, grads = gradients(kernel, [content, position])
    expected, expected_grads = gradients(plain, [content, position], torch.float64)
    assert out.dtype == dtype
    assert error(out, expected) < BOUNDS[dtype]
    if keys == 1:
        return  # one key has all the weight, and no gradient
    for given, wanted in zip(grads, expected_grads, strict=True):
        assert error(given, wanted) < 2 * BOUNDS[dtype]


def test_caps_of_a_whole_batch() -> None:
    content, position = draw(2, 3, 4, 4), draw(2, 3, 4, 7)
    hidden = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 1]], device=DEVICE).bool()
    caps = attention.score_caps(hidden.unsqueeze(1), torch.float32)  # (N, 1, S)
    out = kernels.capped_softmax(content, position, caps, attention.MASKED_SCORE)
    expected = attention._CappedSoftmax.apply(content, position, caps)
    assert error(out, expected) < 2e-6


CHUNKS = [(20, 8, 7), (20, 4, 15), (9, 9, 15), (50, 50, 15), (33, 16, 31), (1, 1, 3)]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("frames", "chunk", "kernel"), CHUNKS)
def test_chunk_causal_conv(dtype, frames, chunk, kernel) -> None:
    channels = 70 if dtype == torch.float32 else 5
    module = zipformer.ChunkCausalDepthwiseConv(channels, kernel)
    torch.nn.init.normal_(module.chunkwise_conv_scale)
    parameters = [parameter.detach().to(DEVICE) for parameter in module.parameters()]
    parameters = [parameter.requires_grad_() for parameter in parameters]
    names = [name for name, _ in module.named_parameters()]
    inputs = [draw(2, frames, channels, dtype=dtype), *parameters]

    def plain(x: Tensor, *parameters: Tensor) -> Tensor:
        module.to(x.device)
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(module, named, (x, chunk))

    def fused(x: Tensor, scale: Tensor, *weights: Tensor) -> Tensor:
        return kernels.chunk_causal_conv(x, weights[:2], weights[2:], scale, chunk)

    assert names[0] == "chunkwise_conv_scale"
    out, grads = gradients(fused, inputs)
    expected, expected_grads = gradients(plain, inputs, torch.float64)
    assert error(out, expected) < BOUNDS[dtype]
    for given, wanted in zip(grads, expected_grads, strict=True):
        assert given.shape == wanted.shape
        assert error(given, wanted) < 3 * BOUNDS[dtype]


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
