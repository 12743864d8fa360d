"""The model as a whole: dimensions, masks, training."""

import dataclasses
import json

import pytest
import torch
from torch import Tensor

from icetransfer.model.scaling import set_batch_count
from icetransfer.model.transducer import (
    SIZES,
    TransducerDims,
    TransducerModel,
    build_transducer,
)
from icetransfer.model.zipformer import chunk_mask


@pytest.fixture(scope="module")
def model(nano_dims: TransducerDims) -> TransducerModel:
    return build_transducer(nano_dims, seed=1).eval()


def features(batch: int, frames: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, frames, 80, generator=torch.Generator().manual_seed(seed))


def test_dims_survive_json(nano_dims: TransducerDims) -> None:
    for dims in (nano_dims, *SIZES.values()):
        assert TransducerDims.from_dict(json.loads(json.dumps(dims.to_dict()))) == dims


def test_bad_dims_are_named(nano_dims: TransducerDims) -> None:
    values = nano_dims.to_dict()
    with pytest.raises(ValueError, match="encoder_dims"):
        TransducerDims.from_dict(values | {"encoder_dims": [1]})
    with pytest.raises(ValueError, match="one length"):
        TransducerDims.from_dict(values | {"encoder_dim": [16]})
    with pytest.raises(ValueError, match="odd"):
        TransducerDims.from_dict(values | {"cnn_module_kernel": [7, 8]})
    del values["joiner_dim"]
    with pytest.raises(ValueError, match="joiner_dim"):
        TransducerDims.from_dict(values)


@pytest.mark.parametrize(
    ("size", "expected"), [("tiny", 0.96e6), ("small", 2.87e6), ("medium", 23.6e6)]
)
def test_sizes(size: str, expected: float) -> None:
    dims = SIZES[size].with_vocabulary(250 if size == "tiny" else 500)
    with torch.device("meta"):
        count = sum(p.numel() for p in TransducerModel(dims).parameters())
    assert count == pytest.approx(expected, rel=0.01)


def test_building_is_seeded_and_leaves_the_generator_alone(nano_dims: TransducerDims) -> None:
    before = torch.get_rng_state()
    first, second = build_transducer(nano_dims, seed=5), build_transducer(nano_dims, seed=5)
    other = build_transducer(nano_dims, seed=6)
    assert torch.equal(torch.get_rng_state(), before)
    name = "joiner.output_linear.weight"
    assert torch.equal(first.state_dict()[name], second.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


@pytest.mark.parametrize("chunk_size", [0, -2, 3, 7])
def test_illegal_chunk_sizes(model: TransducerModel, chunk_size: int) -> None:
    with pytest.raises(ValueError, match=r"multiple of 2 frames .*40 ms"):
        model.encode(features(1, 50), torch.tensor([50]), chunk_size, 8)
    with pytest.raises(ValueError, match=f"chunk_size={chunk_size}"):
        model.initial_state(1, chunk_size, 8)


def test_misfitting_input(model: TransducerModel) -> None:
    with pytest.raises(ValueError, match="T >= 9"):
        model.encode(features(1, 8), torch.tensor([8]))
    with pytest.raises(ValueError, match="finite"):
        model.initial_state(1, 8, -1)
    with pytest.raises(ValueError, match="finite"):
        model.initial_state(1, -1, 8)
    with pytest.raises(ValueError, match="reads"):
        model.encode_chunk(features(1, 28), model.initial_state(1, 8, 8))


@pytest.mark.parametrize("frames", [9, 10, 11, 12, 16, 20, 33])
@pytest.mark.parametrize("chunk_size", [-1, 8])
def test_short_utterances(model: TransducerModel, frames: int, chunk_size: int) -> None:
    with torch.no_grad():
        out, lens = model.encode(features(2, frames), torch.tensor([frames, 9]), chunk_size, 8)
    assert out.shape[:2] == (2, ((frames - 7) // 2 + 1) // 2)
    assert lens.tolist() == [out.shape[1], 1]
    assert out.isfinite().all()


def test_chunk_mask_counts_whole_chunks() -> None:
    hidden = chunk_mask(torch.arange(12), chunk_size=4, left_context_frames=7)
    assert not hidden[5, 0:8].any()  # its own chunk and the 7 // 4 = 1 before
    assert hidden[5, 8:].all()
    assert hidden[9, 0:4].all()
    unlimited = chunk_mask(torch.arange(12), chunk_size=4, left_context_frames=-1)
    assert not unlimited[9].any()


def test_the_future_beyond_the_window_is_not_heard(model: TransducerModel) -> None:
    """Chunk k of c frames may depend on the first 2c(k + 1) + 13 feature frames alone."""
    chunk, heard = 8, 2 * 8 * 2 + 13
    one, other = features(1, 120), features(1, 120, seed=1)
    other[:, :heard] = one[:, :heard]
    lens = torch.tensor([120])
    with torch.no_grad():
        first, _ = model.encode(one, lens, chunk, 16)
        second, _ = model.encode(other, lens, chunk, 16)
    known = 2 * chunk // 2
    torch.testing.assert_close(first[:, :known], second[:, :known], atol=1e-6, rtol=0)
    assert (first[:, known:] - second[:, known:]).abs().max() > 1e-3


def test_the_batch_does_not_matter(model: TransducerModel) -> None:
    x = features(3, 90)
    lens = torch.tensor([90, 90, 90])
    with torch.no_grad():
        together, _ = model.encode(x, lens, 8, 16)
        for i in range(3):
            alone, _ = model.encode(x[i : i + 1], lens[:1], 8, 16)
            torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=0)


def test_decoder_over_a_history_is_the_decoder_step_by_step(nano_dims: TransducerDims) -> None:
    for context_size in (1, 2, 3):
        dims = dataclasses.replace(nano_dims, context_size=context_size)
        model = build_transducer(dims)
        history = torch.randint(0, dims.vocab_size, (2, 6))
        whole = model.decoder(history)
        padded = torch.nn.functional.pad(history, (context_size - 1, 0), value=-1)
        for i in range(6):
            step = model.predict(padded[:, i : i + context_size])
            torch.testing.assert_close(step[:, 0], whole[:, i])


def test_training_lowers_a_loss_with_finite_gradients(nano_dims: TransducerDims) -> None:
    torch.manual_seed(0)
    model = build_transducer(nano_dims, seed=2).train()
    set_batch_count(model, 2000)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    x, lens = features(4, 80), torch.tensor([80, 70, 60, 80])
    target = torch.randint(0, nano_dims.vocab_size, (4, 18))
    losses = []
    assert model.ctc_output is not None
    for step in range(40):
        out, _ = model.encode(x, lens, chunk_size=(-1, 8, 16)[step % 3], left_context_frames=16)
        log_probs = model.ctc_output(out)[:, :18] + model.simple_am_proj(out)[:, :18]
        loss = torch.nn.functional.cross_entropy(log_probs.transpose(1, 2), target)
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.encoder.named_parameters():
            if not name.endswith("layers.0.bypass_scale"):
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_evaluation_mode_is_deterministic_and_training_follows_the_generator(
    nano_dims: TransducerDims,
) -> None:
    model = build_transducer(nano_dims)
    x, lens = features(2, 60), torch.tensor([60, 60])

    def outcome() -> Tensor:
        torch.manual_seed(4)
        return model.encode(x, lens, 8, 8)[0]

    model.train()
    torch.testing.assert_close(outcome(), outcome(), atol=0, rtol=0)
    trained = outcome()
    model.eval()
    assert not torch.allclose(outcome(), trained)
    torch.testing.assert_close(outcome(), model.encode(x, lens, 8, 8)[0], atol=0, rtol=0)
