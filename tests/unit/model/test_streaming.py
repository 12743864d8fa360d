"""Streaming equals masked; streams in a batch equal streams alone."""

import dataclasses

import pytest
import torch
from torch import Tensor

from icetransfer.model.transducer import (
    SIZES,
    StreamingState,
    TransducerDims,
    TransducerModel,
    build_transducer,
)
from icetransfer.streaming.streams import join_streams, select_streams

LOG_EPS = -23.025850929940457


def shapes() -> dict[str, TransducerDims]:
    """Architectures unlike one another: any list of stacks must do."""
    tiny = SIZES["tiny"].with_vocabulary(20)
    three = {
        field.name: getattr(tiny, field.name)[:3]
        for field in dataclasses.fields(tiny)
        if field.name not in ("subsampling_channels", "chunk_sizes", "left_context_frames")
        and isinstance(getattr(tiny, field.name), tuple)
    }
    base = dataclasses.replace(tiny, **three, subsampling_channels=(2, 4, 8), decoder_dim=16)
    return {
        "deep": dataclasses.replace(base, num_encoder_layers=(2, 1, 3)),
        "equal widths": dataclasses.replace(base, encoder_dim=(32, 32, 32)),
        "narrowing, heads": dataclasses.replace(
            base, encoder_dim=(40, 28, 16), num_heads=(2, 8, 1), cnn_module_kernel=(31, 3, 9)
        ),
        "slow first stack": dataclasses.replace(base, downsampling_factor=(2, 4, 1)),
        "by three": dataclasses.replace(base, downsampling_factor=(1, 3, 6), context_size=3),
    }


def randomised(dims: TransducerDims) -> TransducerModel:
    """A model in which no term is hidden by a zero or a one."""
    model = build_transducer(dims, seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(
                0.3 * noise / max(1, parameter[0].numel() if parameter.dim() else 1) ** 0.5
            )
    return model


def stream(model: TransducerModel, features: Tensor, state: StreamingState) -> Tensor:
    """Outputs of every window that lies inside `features` (N, T, 80)."""
    step = 2 * state.chunk_size
    outs = []
    with torch.no_grad():
        for start in range(0, features.size(1) - step - 13 + 1, step):
            out, state = model.encode_chunk(features[:, start : start + step + 13], state)
            outs.append(out)
    return torch.cat(outs, dim=1)


@pytest.mark.parametrize("name", shapes())
@pytest.mark.parametrize("frames", [20, 121, 260])
def test_streaming_equals_masked(name: str, frames: int) -> None:
    model = randomised(shapes()[name])
    step = model.dims.chunk_multiple
    generator = torch.Generator().manual_seed(frames)
    speech = torch.randn(2, frames, 80, generator=generator)
    for chunk, left in ((step, 3 * step), (2 * step, 5 * step)):  # the second left is rounded down
        tail = torch.full((2, 4 * chunk + 13, 80), LOG_EPS)
        features = torch.cat([speech, tail], dim=1)
        streamed = stream(model, features, model.initial_state(2, chunk, left))
        with torch.no_grad():
            lens = torch.full((2,), features.size(1))
            masked, _ = model.encode(features, lens, chunk, left)
        assert 2 * streamed.size(1) * 2 >= frames
        torch.testing.assert_close(streamed, masked[:, : streamed.size(1)], atol=2e-5, rtol=1e-5)


def test_a_stream_does_not_notice_the_others(nano_dims: TransducerDims) -> None:
    """Streams that begin and end at different times, against each alone."""
    model = randomised(nano_dims)
    chunk, left = 4, 8
    features = torch.randn(3, 8 * 6 + 13, 80)
    alone = [
        stream(model, features[i : i + 1], model.initial_state(1, chunk, left)) for i in range(3)
    ]

    def call(
        state: StreamingState, windows: list[tuple[int, int]]
    ) -> tuple[Tensor, StreamingState]:
        size = 2 * chunk + 13
        batch = [features[i, k * 2 * chunk : k * 2 * chunk + size] for i, k in windows]
        with torch.no_grad():
            return model.encode_chunk(torch.stack(batch), state)

    def check(out: Tensor, windows: list[tuple[int, int]]) -> None:
        for row, (i, k) in zip(out, windows, strict=True):
            expected = alone[i][0, k * 2 : (k + 1) * 2]
            torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)

    windows = [(0, 0), (1, 0)]
    out, state = call(model.initial_state(2, chunk, left), windows)
    check(out, windows)
    state = join_streams(state, model.initial_state(1, chunk, left))
    windows = [(0, 1), (1, 1), (2, 0)]
    out, state = call(state, windows)
    check(out, windows)
    state = select_streams(state, [2, 0])
    assert state.processed_lens.tolist() == [4, 8]
    windows = [(2, 1), (0, 2)]
    out, state = call(state, windows)
    check(out, windows)


def test_state_is_a_list_of_named_tensors(nano_dims: TransducerDims) -> None:
    state = build_transducer(nano_dims).initial_state(3, chunk_size=4, left_context_frames=10)
    assert (state.chunk_size, state.left_context_frames, state.batch_size) == (4, 8, 3)
    names = state.names()
    assert names[:6] == [
        f"cached_{part}_0" for part in ("key", "nonlin_attn", "val1", "val2", "conv1", "conv2")
    ]
    assert names[-2:] == ["embed_states", "processed_lens"]
    tensors = state.tensors()
    assert len(names) == len(tensors) == len(state.batch_dims()) == 6 * 2 + 2
    for tensor, dim in zip(tensors, state.batch_dims(), strict=True):
        assert tensor.size(dim) == 3
        assert not tensor.any()
    assert tensors[0].shape == (8, 3, 16)
    assert tensors[6].shape == (4, 3, 16)
    again = state.with_tensors([tensor + 1 for tensor in tensors])
    for before, after in zip(tensors, again.tensors(), strict=True):
        assert torch.equal(before + 1, after)


def test_tracing_gives_the_same_numbers(nano_dims: TransducerDims) -> None:
    model = randomised(nano_dims).requires_grad_(False)
    state = model.initial_state(2, 4, 8)
    features = torch.randn(2, 21, 80)

    def call(features: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        out, new = model.streaming_forward(features, list(tensors))
        return (out, *new)

    with torch.no_grad():
        traced = torch.jit.trace(call, (features, *state.tensors()))
        for batch in (2, 5):
            state = model.initial_state(batch, 4, 8)
            for _ in range(3):
                features = torch.randn(batch, 21, 80)
                out, *tensors = traced(features, *state.tensors())
                expected, state = model.encode_chunk(features, state)
                torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
                for one, other in zip(tensors, state.tensors(), strict=True):
                    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
