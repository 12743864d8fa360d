"""The training losses on a tiny random model."""

import sys

import pytest
import torch
from torch import Tensor, nn

from icetransfer.model.transducer import TransducerDims, TransducerModel
from icetransfer.training import loss as loss_module
from icetransfer.training import rnnt
from icetransfer.training.loss import loss_backend, loss_scales, transducer_loss

ENCODER_DIM, VOCAB = 24, 11


def make_model(use_ctc: bool = False) -> TransducerModel:
    torch.manual_seed(2)
    dims = TransducerDims(
        num_encoder_layers=(1,),
        downsampling_factor=(1,),
        encoder_dim=(ENCODER_DIM,),
        feedforward_dim=(32,),
        num_heads=(2,),
        query_head_dim=(4,),
        value_head_dim=(4,),
        pos_head_dim=(2,),
        cnn_module_kernel=(7,),
        vocab_size=VOCAB,
        decoder_dim=16,
        joiner_dim=20,
        pos_dim=8,
        subsampling_channels=(2, 4, 8),
        use_ctc=use_ctc,
    )
    return TransducerModel(dims).eval()


def batch(frames: list[int], tokens: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    encoder_out = torch.randn(len(frames), max(frames), ENCODER_DIM, generator=generator)
    padded = torch.randint(1, VOCAB, (len(tokens), max(tokens)), generator=generator)
    padded[torch.arange(max(tokens)) >= torch.tensor(tokens).unsqueeze(1)] = 0
    return encoder_out.requires_grad_(), torch.tensor(frames), padded, torch.tensor(tokens)


def test_wide_range_is_the_whole_lattice() -> None:
    model = make_model()
    encoder_out, frames, tokens, token_lens = batch([9, 6], [4, 2])
    losses = transducer_loss(
        model, encoder_out, frames, tokens, token_lens, prune_range=5, backend="torch"
    )
    decoder_out = model.decoder(nn.functional.pad(tokens, (1, 0)))
    logits = model.joiner(encoder_out.unsqueeze(2), decoder_out.unsqueeze(1))
    boundary = torch.tensor([[0, 0, 4, 9], [0, 0, 2, 6]])
    expected = rnnt.rnnt_loss(logits, tokens, 0, boundary, reduction="sum")
    torch.testing.assert_close(losses.pruned, expected)


def test_never_builds_the_whole_lattice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    shapes = []
    forward = model.joiner.forward

    def recorded(*args: Tensor, **kwargs: bool) -> Tensor:
        out = forward(*args, **kwargs)
        shapes.append(tuple(out.shape))
        return out

    monkeypatch.setattr(model.joiner, "forward", recorded)
    transducer_loss(model, *batch([30, 25], [20, 10]), prune_range=3, backend="torch")
    assert shapes == [(2, 30, 3, VOCAB)]


@pytest.mark.filterwarnings("ignore:pruning range")
@pytest.mark.parametrize("use_ctc", [False, True])
@pytest.mark.parametrize(
    ("frames", "tokens"),
    [
        ([5, 3], [0, 0]),  # no tokens at all
        ([1, 1], [1, 0]),  # one frame
        ([3, 1, 8], [9, 4, 2]),  # more tokens than frames
        ([40], [1]),
    ],
)
def test_odd_utterances_give_finite_losses(
    frames: list[int], tokens: list[int], use_ctc: bool
) -> None:
    model = make_model(use_ctc)
    encoder_out, *rest = batch(frames, tokens)
    losses = transducer_loss(model, encoder_out, *rest, backend="torch")
    total = losses.total(0.5, 1.0, 0.2)
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(encoder_out.grad).all()
    for name, param in model.named_parameters():
        assert param.grad is None or torch.isfinite(param.grad).all(), name


def test_losses_are_sums_over_utterances() -> None:
    model = make_model(use_ctc=True)
    encoder_out, frames, tokens, token_lens = batch([9, 6], [4, 2])
    both = transducer_loss(model, encoder_out, frames, tokens, token_lens, lm_scale=0.25)
    one, other = (
        transducer_loss(
            model,
            encoder_out[n : n + 1, : frames[n]],
            frames[n : n + 1],
            tokens[n : n + 1, : token_lens[n]],
            token_lens[n : n + 1],
        )
        for n in range(2)
    )
    for kind in ("simple", "pruned", "ctc"):
        torch.testing.assert_close(
            getattr(both, kind), getattr(one, kind) + getattr(other, kind), rtol=1e-4, atol=1e-4
        )
    torch.testing.assert_close(
        both.total(0.5, 1.0, 0.2), 0.5 * both.simple + both.pruned + 0.2 * both.ctc
    )


def test_modified_with_too_many_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="sequence 1 of the batch"):
        transducer_loss(make_model(), *batch([9, 3], [4, 5]), rnnt_type="modified", backend="torch")


def test_warm_up() -> None:
    assert loss_scales(0, 100, 0.5) == (1.0, pytest.approx(0.1))
    assert loss_scales(50, 100, 0.5) == (pytest.approx(0.75), pytest.approx(0.55))
    assert loss_scales(100, 100, 0.5) == loss_scales(10**6, 100, 0.5) == (0.5, 1.0)
    assert loss_scales(0, 0, 0.5) == (0.5, 1.0)


@pytest.fixture
def fresh_backends() -> None:
    loss_module._functions.cache_clear()
    yield
    loss_module._functions.cache_clear()


@pytest.mark.usefixtures("fresh_backends")
def test_backend_without_k2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "k2", None)
    monkeypatch.setattr(loss_module.importlib.util, "find_spec", lambda name: None)
    assert loss_backend() == "torch"
    with pytest.raises(ValueError, match="k2 cannot be imported"):
        loss_backend("k2")
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        loss_backend("cuda")


class StandIn:
    """k2's functions, with k2 1.24's names of arguments and their defaults.

    Checks what the kernels of k2 would take; the results are those of `rnnt`.

    Args:
        N, T, S, V: of the batch.
    """

    def __init__(self, N: int, T: int, S: int, V: int) -> None:
        self.N, self.T, self.S, self.V = N, T, S, V
        self.calls: list[str] = []

    def check(
        self, call: str, tensors: dict[str, tuple[Tensor, torch.dtype, tuple[int, ...]]]
    ) -> None:
        self.calls.append(call)
        for name, (tensor, dtype, shape) in tensors.items():
            assert tensor.dtype == dtype, (call, name)
            assert tuple(tensor.shape) == shape, (call, name)

    def check_lattice(self, symbols: Tensor, boundary: Tensor, termination_symbol: int) -> None:
        assert termination_symbol == 0
        assert symbols.tolist() == TOKENS.tolist()
        assert boundary.tolist() == [[0, 0, 4, 9], [0, 0, 2, 6]]

    def rnnt_loss_smoothed(
        self, lm: Tensor, am: Tensor, symbols: Tensor, termination_symbol: int,
        lm_only_scale: float = 0.1, am_only_scale: float = 0.1, boundary: Tensor | None = None,
        rnnt_type: str = "regular", delay_penalty: float = 0.0, reduction: str = "mean",
        return_grad: bool = False,
    ) -> object:  # fmt: skip
        N, T, S, V = self.N, self.T, self.S, self.V
        self.check("smoothed", {
            "lm": (lm, torch.float32, (N, S + 1, V)), "am": (am, torch.float32, (N, T, V)),
            "symbols": (symbols, torch.int64, (N, S)), "boundary": (boundary, torch.int64, (N, 4)),
        })  # fmt: skip
        self.check_lattice(symbols, boundary, termination_symbol)
        assert (lm_only_scale, am_only_scale, delay_penalty) == (0.25, 0.0, 0.0)
        assert (rnnt_type, reduction, return_grad) == ("regular", "sum", True)
        return rnnt.rnnt_loss_smoothed(
            lm, am, symbols, termination_symbol, lm_only_scale, am_only_scale, boundary, rnnt_type,
            delay_penalty, reduction, return_grad,
        )  # fmt: skip

    def get_rnnt_prune_ranges(
        self, px_grad: Tensor, py_grad: Tensor, boundary: Tensor, s_range: int
    ) -> Tensor:
        N, T, S = self.N, self.T, self.S
        self.check("ranges", {
            "px_grad": (px_grad, torch.float32, (N, S, T + 1)),
            "py_grad": (py_grad, torch.float32, (N, S + 1, T)),
            "boundary": (boundary, torch.int64, (N, 4)),
        })  # fmt: skip
        assert s_range == 3
        return rnnt.get_rnnt_prune_ranges(px_grad, py_grad, boundary, s_range)

    def do_rnnt_pruning(self, am: Tensor, lm: Tensor, ranges: Tensor) -> tuple[Tensor, Tensor]:
        self.check("pruning", {
            "am": (am, torch.float32, (self.N, self.T, 20)),
            "lm": (lm, torch.float32, (self.N, self.S + 1, 20)),
            "ranges": (ranges, torch.int64, (self.N, self.T, 3)),
        })  # fmt: skip
        return rnnt.do_rnnt_pruning(am, lm, ranges)

    def rnnt_loss_pruned(
        self, logits: Tensor, symbols: Tensor, ranges: Tensor, termination_symbol: int,
        boundary: Tensor | None = None, rnnt_type: str = "regular", delay_penalty: float = 0.0,
        reduction: str = "mean", use_hat_loss: bool = False,
    ) -> Tensor:  # fmt: skip
        self.check("pruned", {
            "logits": (logits, torch.float32, (self.N, self.T, 3, self.V)),
            "symbols": (symbols, torch.int64, (self.N, self.S)),
            "ranges": (ranges, torch.int64, (self.N, self.T, 3)),
            "boundary": (boundary, torch.int64, (self.N, 4)),
        })  # fmt: skip
        self.check_lattice(symbols, boundary, termination_symbol)
        assert (rnnt_type, delay_penalty, reduction) == ("regular", 0.0, "sum")
        assert not use_hat_loss
        return rnnt.rnnt_loss_pruned(
            logits, symbols, ranges, termination_symbol, boundary, rnnt_type, delay_penalty,
            reduction,
        )  # fmt: skip


TOKENS = batch([9, 6], [4, 2])[2]


@pytest.mark.usefixtures("fresh_backends")
def test_k2_is_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = StandIn(2, 9, 4, VOCAB)
    monkeypatch.setitem(sys.modules, "k2", stand_in)
    assert loss_backend() == "k2"
    results = []
    for backend in ("auto", "torch"):
        model = make_model()
        encoder_out, *rest = batch([9, 6], [4, 2])
        losses = transducer_loss(model, encoder_out, *rest, prune_range=3, backend=backend)
        total = losses.total(0.5, 1.0)
        total.backward()
        results.append([losses.simple, losses.pruned, encoder_out.grad])
    assert stand_in.calls == ["smoothed", "ranges", "pruning", "pruned"]
    assert loss_backend("torch") == "torch"
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
