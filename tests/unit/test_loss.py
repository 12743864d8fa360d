"""The training losses on a tiny random model."""

import sys

import pytest
import torch
from torch import Tensor, nn

from icetransfer import loss as loss_module
from icetransfer import rnnt
from icetransfer.loss import loss_backend, loss_scales, transducer_loss
from icetransfer.model.transducer import TransducerDims, TransducerModel

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


@pytest.mark.usefixtures("fresh_backends")
def test_k2_is_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in under k2's name: called with k2's argument names."""
    monkeypatch.setitem(sys.modules, "k2", type(sys)("k2"))
    calls = []
    for name in (
        "rnnt_loss_smoothed",
        "get_rnnt_prune_ranges",
        "do_rnnt_pruning",
        "rnnt_loss_pruned",
    ):

        def stand_in(*args: object, name: str = name, **kwargs: object) -> object:
            assert not args
            calls.append(name)
            return getattr(rnnt, name)(**kwargs)

        setattr(sys.modules["k2"], name, stand_in)
    assert loss_backend() == "k2"
    transducer_loss(make_model(), *batch([9, 6], [4, 2]))
    assert len(calls) == 4
    assert loss_backend("torch") == "torch"
