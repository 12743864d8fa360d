"""What is clever for CPUs gives the numbers of the plain forms."""

import pytest
import torch
import torch.nn.functional as F

from icetransfer.model import cpu, subsampling, swoosh
from icetransfer.model.cpu import BLOCK_ROWS, LEAST_WEIGHTS
from icetransfer.model.linear import Linear
from icetransfer.model.subsampling import ConvNeXt


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("rows", "width", "outputs"), [(700, 64, 128), (700, 512, 100), (1400, 100, 512)]
)
def test_linear_and_its_gradients_equal_torch(rows, width, outputs):
    # Blocks for oneDNN, and a rest for MKL.
    assert rows > BLOCK_ROWS and rows % BLOCK_ROWS and width * outputs >= LEAST_WEIGHTS
    torch.manual_seed(1)
    layer = Linear(width, outputs)
    x = torch.randn(7, rows // 7, width, requires_grad=True)
    inputs = (x, layer.weight, layer.bias)
    grad = torch.randn(7, rows // 7, outputs)
    found, expected = layer(x), F.linear(*inputs)
    assert relative(found, expected) < 1e-6
    gradients = zip(
        torch.autograd.grad(found, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    )
    assert all(relative(a, b) < 1e-5 for a, b in gradients)


def test_linear_without_onednn_or_in_double_precision(monkeypatch):
    torch.manual_seed(1)
    layer, x = Linear(512, 100), torch.randn(700, 512)
    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert torch.equal(layer.double()(x.double()), expected)
    monkeypatch.setattr(cpu, "ONEDNN", None)
    assert relative(layer.float()(x).double(), expected) < 1e-6


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_convnext_by_blocks_equals_the_plain_one(monkeypatch, prob):
    torch.manual_seed(1)
    block = ConvNeXt(16).train()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    block.hidden_balancer.prob.value, block.out_balancer.prob.value = prob, 0.0
    block.hidden_balancer.max_abs = 0.5  # exceeded: there is something to push
    x = torch.randn(2, 16, 90, 19).to(memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn(2, 16, 90, 19)
    inputs = (x, *block.parameters())

    def run():
        y = block(x)
        return y.detach(), *torch.autograd.grad(y, inputs, grad)

    monkeypatch.setattr(cpu, "BLOCK", 10_000)  # several blocks
    by_blocks = run()
    monkeypatch.setattr(subsampling, "is_plain_float32", lambda x: False)
    assert all(relative(a, b) < 1e-5 for a, b in zip(by_blocks, run(), strict=True))


def test_balancer_changes_the_gradient_of_the_blocks():
    torch.manual_seed(1)
    block = ConvNeXt(16).train()
    block.out_balancer.prob.value = 0.0
    block.hidden_balancer.max_abs = 0.01
    x = torch.randn(1, 16, 30, 19).to(memory_format=torch.channels_last).requires_grad_()
    gradients = []
    for prob in (0.0, 1.0):
        block.hidden_balancer.prob.value = prob
        weight = block.pointwise_conv1.weight
        gradients.append(torch.autograd.grad(block(x).square().sum(), weight)[0])
    assert 1e-3 < relative(gradients[1], gradients[0]) < 1.0


@pytest.mark.parametrize("constants", [swoosh.SWOOSH_R, swoosh.SWOOSH_L])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_swoosh_by_blocks_equals_the_plain_one(constants, dtype):
    x = torch.cat([torch.linspace(-200, 200, 300_001), torch.tensor([88.0, 1e4, -1e4])]).to(dtype)
    by_blocks = cpu.swoosh_and_slope(x, *constants, with_slope=True)
    plain = swoosh.swoosh_and_slope(x, *constants, with_slope=True)
    for found, expected in zip(by_blocks, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("constants", [swoosh.SWOOSH_R, swoosh.SWOOSH_L])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_swoosh_in_half_precision_is_rounded_once(constants, dtype, bound):
    x = torch.linspace(-200, 200, 4001).to(dtype)
    exact = swoosh.swoosh_and_slope(x.double(), *constants, with_slope=True)
    for found, expected in zip(
        swoosh.swoosh_and_slope(x, *constants, with_slope=True), exact, strict=True
    ):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=bound, atol=1e-4)
