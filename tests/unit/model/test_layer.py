"""Layers by kernels against their plain forms, in Triton's interpreter or on a GPU.

The plain forms compute in float64.  Outputs are poisoned, so that what no program wrote shows.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from icetransfer.model import attention, gpu, scaling, zipformer
from icetransfer.model.linear import Linear
from icetransfer.model.swoosh import SWOOSH_L, swoosh_and_slope
from icetransfer.model.zipformer import StackDims, Zipformer
from tests.kernels import DEVICE, few_programs, gradients, kernels_of, poisoned

layer = kernels_of("icetransfer.model.layer")
gates = kernels_of("icetransfer.model.kernels.gates")
stream = kernels_of("icetransfer.model.kernels.stream")

# The interpreter computes, and does not store, what lies outside of a tensor.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

BOUNDS = {torch.float32: 4e-6, torch.float16: 3e-3, torch.bfloat16: 2.5e-2}


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(0)
    few_programs(monkeypatch)
    monkeypatch.setattr(scaling, "fires", lambda prob: False)
    with poisoned():
        yield


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype).requires_grad_()


def error(given: Tensor, expected: Tensor) -> float:
    expected = expected.detach().double()
    return float((given.detach().double() - expected).norm() / expected.norm())


def sight(lengths: Sequence[int], step: int = 1, chunk: int = 0, left: int = -1):
    return layer.Sight(torch.tensor(lengths, device=DEVICE), step, chunk, left)


def stirred(module: nn.Module) -> nn.Module:
    """The module with parameters that are not what they are at the start, such as zero."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.to(DEVICE)


def compare(
    module: nn.Module,
    by_kernels: Callable[[Tensor], Tensor],
    plain: Callable[[Tensor], Tensor],
    x: Tensor,
) -> None:
    """Outputs and all gradients of a module; what is plain runs on the module in float64."""
    inputs = [x, *module.parameters()]
    out, grads = gradients(lambda x, *_: by_kernels(x), inputs)
    module.double()
    wide = [x.detach().double().requires_grad_(), *module.parameters()]
    expected, wanted = gradients(lambda x, *_: plain(x), wide)
    names = ["x", *(name for name, _ in module.named_parameters())]
    bound = BOUNDS[x.dtype]
    assert out.dtype == x.dtype
    assert error(out, expected) < bound
    for name, given, own in zip(names, grads, wanted, strict=True):
        wrong = float((given.double() - own).norm())
        assert wrong < 3 * bound * float(own.norm()) + 1e-3, name  # some are zero, but for rounding


CHUNKS = [(20, 8, 7), (20, 4, 15), (9, 9, 15), (50, 50, 15), (33, 16, 31), (1, 1, 3), (40, 33, 7)]


@pytest.mark.parametrize(("frames", "chunk", "kernel"), CHUNKS)
def test_convolution_module(frames, chunk, kernel) -> None:
    module = stirred(zipformer.ConvolutionModule(20, kernel))
    lengths = [2 * frames, frames]
    padding = 2 * torch.arange(frames) >= torch.tensor(lengths).unsqueeze(1)
    own = sight(lengths, step=2, chunk=chunk)

    def by_kernels(x: Tensor) -> Tensor:
        return layer._convolve(module, x, own) + module.out_proj.bias

    x = draw(2, frames, 20)
    compare(module, by_kernels, lambda x: module(x, padding.to(DEVICE), chunk), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_convolution_module_in_half_precision(dtype) -> None:
    module = stirred(zipformer.ConvolutionModule(20, 7))
    padding = torch.zeros(2, 19, dtype=torch.bool, device=DEVICE)
    own = sight([19, 19], chunk=8)

    def by_kernels(x: Tensor) -> Tensor:
        return layer._convolve(module, x, own) + module.out_proj.bias.to(dtype)

    compare(module, by_kernels, lambda x: module(x, padding, 8), draw(2, 19, 20, dtype=dtype))


@pytest.mark.parametrize("dtype", BOUNDS)
def test_feed_forward(dtype) -> None:
    module = stirred(zipformer.FeedForward(20, 35)).eval()

    def by_kernels(x: Tensor) -> Tensor:
        return layer._feed_forward(module, x) + module.out_proj.bias.to(dtype)

    compare(module, by_kernels, module, draw(3, 7, 20, dtype=dtype))


class Attentions(nn.Module):
    """All that has to do with attention: the weights and their three uses."""

    def __init__(self, channels: int, heads: int, query: int, position: int, value: int) -> None:
        super().__init__()
        self.weights = attention.AttentionWeights(channels, 8, heads, query, position)
        self.nonlin = attention.NonlinAttention(channels, 18)
        self.first = attention.SelfAttention(channels, heads, value)
        self.second = attention.SelfAttention(channels, heads, value)

    def forward(self, x: Tensor, position: Tensor, caps: Tensor) -> Tensor:
        weights = self.weights(x, position, caps)
        y = self.nonlin(x, weights[0]) + self.first(x, weights)
        return y + self.second(y, weights)


SIGHTS = {
    "all": (21, [21, 9], 0, -1),
    "one frame": (1, [1, 1], 0, -1),
    "chunks with all before them": (33, [33, 20], 8, -1),
    "chunks with some before them": (33, [33, 17], 4, 2),
    "chunks alone": (20, [20, 13], 8, 0),
    "a chunk that is longer": (20, [20, 13], 32, 1),
}


@pytest.mark.parametrize("heads", [(1, 12, 4, 8), (3, 16, 3, 20)], ids=["one head", "three heads"])
@pytest.mark.parametrize("case", SIGHTS)
def test_attention(case, heads) -> None:
    frames, lengths, chunk, left = SIGHTS[case]
    module = stirred(Attentions(20, *heads))
    own = sight(lengths, chunk=chunk, left=left)
    x = draw(2, frames, 20)
    position = attention.CompactRelPositionalEncoding(8)(x.detach())
    at = torch.arange(frames)
    hidden = (at >= torch.tensor(lengths).unsqueeze(1)).unsqueeze(1)
    if chunk:
        hidden = hidden | zipformer.chunk_mask(at, chunk, left * chunk)
    caps = attention.score_caps(hidden.to(DEVICE), torch.float64)
    there = (at < torch.tensor(lengths).unsqueeze(1)).unsqueeze(2).to(DEVICE)  # the rest is unused

    def by_kernels(x: Tensor) -> Tensor:
        uses = []
        weights = layer._weights(module.weights, x, position, own, uses)
        y = layer._nonlin(module.nonlin, x, weights, own, uses) + module.nonlin.out_proj.bias
        y = y + layer._attend(module.first, x, weights, own, uses) + module.first.out_proj.bias
        again = layer._attend(module.second, y, weights, own, uses) + module.second.out_proj.bias
        return (y + again) * there

    compare(module, by_kernels, lambda x: module(x, position.double(), caps) * there, x)


DIMS = (StackDims(1, 1, 20, 32, 2, 12, 8, 4, 8, 7), StackDims(1, 3, 24, 24, 3, 5, 6, 3, 8, 15))
TIERS = [(-1, -1), (6, 12)]


def encoder() -> tuple[Zipformer, Tensor, Tensor]:
    """A small encoder, with (N, T, C) and lengths to run it on; its lengths fit no frame rate."""
    model = Zipformer(list(DIMS))
    for name, parameter in model.named_parameters():
        if "bypass_scale" not in name:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.to(DEVICE), draw(2, 25, 20), torch.tensor([25, 14])


def run(
    model: Zipformer, x: Tensor, lengths: Tensor, tier: tuple[int, int], kernels: bool, monkeypatch
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output where there is something, and the gradients of its sum with random weights."""
    monkeypatch.setattr(gpu, "takes_kernels", lambda x: kernels)
    x = x.detach().requires_grad_()
    model.zero_grad()
    out, lens = model(x, lengths, *tier)
    there = torch.arange(out.size(1)) < lens.unsqueeze(1)
    out = (out * there.unsqueeze(2).to(DEVICE)).double()
    draws = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    (out * draws).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out.detach(), grads | {"x": x.grad}


@pytest.mark.parametrize("tier", TIERS)
def test_encoder(tier, monkeypatch) -> None:
    model, x, lengths = encoder()
    model.eval()
    out, grads = run(model, x, lengths, tier, True, monkeypatch)
    model.double()
    expected, wanted = run(model, x.double(), lengths, tier, False, monkeypatch)
    assert error(out, expected) < 1e-6
    assert grads.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert error(grads[name], grad) < 5e-5, name


def without_draws(model: Zipformer) -> None:
    """Training as it is without dropout and skipped sequences."""
    model.train()
    scaling.set_batch_count(model, 50_000)
    for module in model.modules():
        if isinstance(module, zipformer.FeedForward):
            module.dropout.value = 0.0


def test_regularisers_and_limits(monkeypatch) -> None:
    model, x, _ = encoder()
    lengths = torch.tensor(
        [25, 25]
    )  # what is past the end of an utterance counts here, and differs
    without_draws(model)
    monkeypatch.setattr(scaling, "fires", lambda prob: True)
    with torch.no_grad():  # beyond both limits, so that gradients are turned round
        for module in model.modules():
            if isinstance(module, zipformer.Bypass):
                module.bypass_scale.uniform_(0.0, 1.2)
            if isinstance(module, scaling.BiasNorm):
                module.log_scale.fill_(1.7)
    out, grads = run(model, x, lengths, (6, 12), True, monkeypatch)
    # In the same precision: what is just beyond a limit in one may be within it in the other.
    expected, wanted = run(model, x, lengths, (6, 12), False, monkeypatch)
    assert error(out, expected) < 1e-6
    for name, grad in wanted.items():
        assert error(grads[name], grad) < 1e-3, name  # whitening subtracts what is nearly equal
    _, unregularised = run(model.eval(), x, lengths, (6, 12), False, monkeypatch)
    name = "encoders.0.layers.0.feed_forward1.in_proj.weight"
    assert error(unregularised[name], wanted[name]) > 1e-2


# Relative errors of the output and of the gradient against float64; plain forms on a CPU alike.
HALF_BOUNDS = {torch.float16: (2e-4, 5e-4), torch.bfloat16: (4.9e-3, 1.5e-2)}


@pytest.mark.parametrize("dtype", HALF_BOUNDS)
@pytest.mark.parametrize("kernels", [True, False])
def test_half_precision(dtype, kernels, monkeypatch) -> None:
    model, x, lengths = encoder()
    model.eval()
    if kernels or DEVICE.type == "cpu":
        with torch.autocast(DEVICE.type, dtype):
            out, grads = run(model, x, lengths, (6, 12), kernels, monkeypatch)
        expected, wanted = run(model.double(), x.double(), lengths, (6, 12), False, monkeypatch)
        of_out, of_grads = HALF_BOUNDS[dtype]
        assert error(out, expected) < of_out
        flat, whole = (
            torch.cat([g[name].double().flatten() for name in wanted]) for g in (grads, wanted)
        )
        assert error(flat, whole) < of_grads


def test_dropout_is_of_whole_channels_and_the_same_backwards() -> None:
    x = draw(3, 11, 200).detach()
    out = gates.swoosh_dropout(x, SWOOSH_L, 0.3, 5)
    swoosh, slope = swoosh_and_slope(x.double(), *SWOOSH_L, with_slope=True)
    mask = (out / swoosh > 0.5).any(dim=1, keepdim=True).double() / 0.7
    assert error(out, mask * swoosh) < 1e-6
    assert 0.6 < float((mask > 0).double().mean()) < 0.8
    assert not torch.equal(mask[0], mask[1])
    grad = torch.randn_like(x)
    again, of_x, sums = gates.swoosh_dropout_grad(x, grad, SWOOSH_L, 0.3, 5)
    assert torch.equal(again, out)
    assert error(of_x, grad.double() * mask * slope) < 1e-5
    assert error(sums, of_x.double().sum((0, 1))) < 1e-5
    other = gates.swoosh_dropout(x, SWOOSH_L, 0.3, 6)
    assert not torch.equal(other == 0, out == 0)


def test_sequences_that_go_round_a_module() -> None:
    source, full, y = draw(40, 3, 8), draw(40, 3, 8), draw(40, 3, 8)
    bias, scale = draw(8), draw(8)
    skip = layer.Skip(seed=3, share=0.4, low=-9.0, high=9.0)
    inputs = [source, full, y, bias, scale]
    out, grads = gradients(lambda *x: layer._Mix.apply(*x, skip)[0], inputs)
    skipped = (out == source).all(dim=2).all(dim=1)
    assert 8 <= int(skipped.sum()) <= 24
    kept = (~skipped).double().view(-1, 1, 1)

    def plain(source, full, y, bias, scale) -> Tensor:
        return source + kept * scale * (full + y + bias - source)

    expected, wanted = gradients(plain, inputs, torch.float64)
    assert error(out, expected) < 1e-6
    for given, own in zip(grads, wanted, strict=True):
        assert error(given, own) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_has_gradients_in_full_precision(dtype, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "takes_kernels", lambda x: True)
    module = Linear(20, 9).to(DEVICE)
    x = draw(4, 3, 20)
    with torch.autocast(DEVICE.type, dtype):
        out = module(x)
    assert out.dtype == dtype
    grad = torch.randn_like(out)
    given = torch.autograd.grad(out, [x, module.weight, module.bias], grad)
    expected = module.double()(x.double())
    wanted = torch.autograd.grad(expected, [x, module.weight, module.bias], grad.double())
    assert [g.dtype for g in given] == [torch.float32] * 3
    for own, other in zip(given, wanted, strict=True):
        assert error(own, other) < BOUNDS[dtype]


def test_copies_in_half_precision_follow_the_parameters() -> None:
    weight = nn.Parameter(torch.randn(3, 3, device=DEVICE))
    first = gpu.half(weight, torch.bfloat16)
    assert gpu.half(weight, torch.bfloat16) is first
    with torch.no_grad():
        weight.mul_(2)
    gpu.refresh_halves()
    assert gpu.half(weight, torch.bfloat16) is first
    assert torch.equal(first, weight.detach().to(torch.bfloat16))
    with torch.no_grad():
        weight.add_(1)
    assert torch.equal(gpu.half(weight, torch.bfloat16), weight.detach().to(torch.bfloat16))
    assert gpu.half(weight, torch.float16).dtype == torch.float16


def test_what_is_frozen_has_no_gradient(monkeypatch) -> None:
    model, x, lengths = encoder()
    model.requires_grad_(False)
    last = model.encoders[1].requires_grad_(True)
    _, grads = run(model.eval(), x, lengths, (6, 12), True, monkeypatch)
    names = {f"encoders.1.{name}" for name, _ in last.named_parameters()}
    unused = {name for name in names if name.endswith("layers.0.bypass_scale")}
    assert grads.keys() - {"x"} == names - unused
