"""The whole model: front end, encoder, decoder, joiner and the heads of the training losses.

Shapes: N batch, T feature frames (10 ms), T2 = (T-7)//2 (20 ms), T4 = (T2+1)//2 (40 ms), C encoder
channels, D decoder channels, V vocabulary, L cached frames of left context, c chunk_size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from icetransfer.config import FRAME_MS
from icetransfer.model.decoder import Decoder
from icetransfer.model.joiner import Joiner
from icetransfer.model.linear import Linear, scaled_linear
from icetransfer.model.subsampling import (
    FEATURE_DIM,
    WINDOW_EXTRA,
    Conv2dSubsampling,
    subsampled_length,
)
from icetransfer.model.zipformer import LayerState, StackDims, Zipformer

OUTPUT_FACTOR = 2  # from those frames to encoder outputs
_PER_STACK = (
    "num_encoder_layers",
    "downsampling_factor",
    "encoder_dim",
    "feedforward_dim",
    "num_heads",
    "query_head_dim",
    "value_head_dim",
    "pos_head_dim",
    "cnn_module_kernel",
)


@dataclass(frozen=True)
class TransducerDims:
    """Everything that fixes the architecture, in the words of icefall's flags.

    The per-stack fields are tuples of one length, the number of stacks. `chunk_sizes` and
    `left_context_frames` (50 Hz frames, -1 for all) are what training draws from, not shapes.
    """

    num_encoder_layers: tuple[int, ...]
    downsampling_factor: tuple[int, ...]
    encoder_dim: tuple[int, ...]
    feedforward_dim: tuple[int, ...]
    num_heads: tuple[int, ...]
    query_head_dim: tuple[int, ...]
    value_head_dim: tuple[int, ...]
    pos_head_dim: tuple[int, ...]
    cnn_module_kernel: tuple[int, ...]
    vocab_size: int
    decoder_dim: int
    joiner_dim: int
    pos_dim: int = 48
    context_size: int = 2
    subsampling_channels: tuple[int, ...] = (8, 32, 128)
    use_ctc: bool = False
    chunk_sizes: tuple[int, ...] = (16, 32, 64, -1)
    left_context_frames: tuple[int, ...] = (64, 128, 256, -1)

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in _PER_STACK}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError(f"per-stack sizes must be lists of one length, got lengths {lengths}")
        for i, kernel in enumerate(self.cnn_module_kernel):
            if kernel % 2 == 0:
                raise ValueError(f"cnn_module_kernel of stack {i} is {kernel}; it must be odd")
        if len(self.subsampling_channels) != 3:
            raise ValueError(
                f"subsampling_channels must be three numbers, got {self.subsampling_channels}"
            )

    @property
    def num_stacks(self) -> int:
        """Number of encoder stacks."""
        return len(self.encoder_dim)

    @property
    def encoder_out_dim(self) -> int:
        """C, channels of the encoder output."""
        return max(self.encoder_dim)

    @property
    def chunk_multiple(self) -> int:
        """Every chunk size must be a multiple of this many 50 Hz frames."""
        return math.lcm(*self.downsampling_factor, OUTPUT_FACTOR)

    def stack_dims(self, i: int) -> StackDims:
        """Sizes of stack `i`."""
        return StackDims(
            num_layers=self.num_encoder_layers[i],
            downsampling_factor=self.downsampling_factor[i],
            encoder_dim=self.encoder_dim[i],
            feedforward_dim=self.feedforward_dim[i],
            num_heads=self.num_heads[i],
            query_head_dim=self.query_head_dim[i],
            value_head_dim=self.value_head_dim[i],
            pos_head_dim=self.pos_head_dim[i],
            pos_dim=self.pos_dim,
            cnn_module_kernel=self.cnn_module_kernel[i],
        )

    def with_vocabulary(self, vocab_size: int) -> TransducerDims:
        """The same architecture for `vocab_size` tokens."""
        return dataclasses.replace(self, vocab_size=vocab_size)

    def check_chunk_size(self, chunk_size: int) -> None:
        """Refuses a chunk that the downsampled stacks cannot divide.

        Raises:
            ValueError: `chunk_size` is neither -1 nor a positive multiple of `chunk_multiple`.
        """
        step = self.chunk_multiple
        if chunk_size == -1 or (chunk_size > 0 and chunk_size % step == 0):
            return
        below = max(chunk_size // step, 1) * step
        near = ", ".join(f"{c} ({c * FRAME_MS} ms)" for c in (below, below + step))
        raise ValueError(
            f"chunk_size={chunk_size} ({chunk_size * FRAME_MS} ms) does not fit this model: it "
            f"must be a multiple of {step} frames of {FRAME_MS} ms ({step * FRAME_MS} ms), the "
            f"common multiple of its downsampling factors {self.downsampling_factor}, or -1 for "
            f"offline; use for example {near}"
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict: tuples become lists."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TransducerDims:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a name that is not a field, or a field without a default is absent.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - names):
            raise ValueError(
                f"unknown model dimensions {unknown}; expected some of {sorted(names)}"
            )
        try:
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        except TypeError as error:
            raise ValueError(f"incomplete model dimensions: {error}") from error


@dataclass(frozen=True)
class StreamingState:
    """What a batch of streams carries from one chunk to the next.

    `tensors()` lists it in the order, and `names()` under the names, of the ONNX encoder's inputs.
    """

    layers: tuple[LayerState, ...]
    embed_states: Tensor  # (N, front-end channels, 3, F')
    processed_lens: Tensor  # (N,) int64, 50 Hz frames seen so far
    chunk_size: int
    left_context_frames: int  # the effective one, a multiple of chunk_size

    @property
    def batch_size(self) -> int:
        """Number of streams."""
        return self.processed_lens.size(0)

    def names(self) -> list[str]:
        """Names of the tensors."""
        layers = [f"cached_{f}_{i}" for i in range(len(self.layers)) for f in LayerState._fields]
        return [*layers, "embed_states", "processed_lens"]

    def tensors(self) -> list[Tensor]:
        """The tensors, in the order of `names()`."""
        return [
            *(t for layer in self.layers for t in layer),
            self.embed_states,
            self.processed_lens,
        ]

    def batch_dims(self) -> list[int]:
        """For each tensor, the dimension that counts the streams."""
        of_layer = LayerState(key=1, nonlin_attn=1, val1=1, val2=1, conv1=0, conv2=0)
        return [*(of_layer * len(self.layers)), 0, 0]

    def with_tensors(self, tensors: list[Tensor]) -> StreamingState:
        """The same kind of state made of other `tensors`, in the order of `names()`."""
        *of_layers, embed_states, processed_lens = tensors
        return dataclasses.replace(
            self,
            layers=group_layers(of_layers),
            embed_states=embed_states,
            processed_lens=processed_lens,
        )


def group_layers(tensors: list[Tensor]) -> tuple[LayerState, ...]:
    """Groups a flat list of caches by layer."""
    size = len(LayerState._fields)
    return tuple(LayerState(*tensors[i : i + size]) for i in range(0, len(tensors), size))


class TransducerModel(nn.Module):
    """A causal Zipformer transducer.

    Args:
        dims: the architecture.
    """

    def __init__(self, dims: TransducerDims) -> None:
        super().__init__()
        self.dims = dims
        stacks = [dims.stack_dims(i) for i in range(dims.num_stacks)]
        encoder_dim, vocab_size = dims.encoder_out_dim, dims.vocab_size
        self.encoder_embed = Conv2dSubsampling(dims.subsampling_channels, dims.encoder_dim[0])
        self.encoder = Zipformer(stacks)
        self.decoder = Decoder(vocab_size, dims.decoder_dim, dims.context_size)
        self.joiner = Joiner(encoder_dim, dims.decoder_dim, dims.joiner_dim, vocab_size)
        self.simple_am_proj = scaled_linear(encoder_dim, vocab_size, scale=0.25)
        self.simple_lm_proj = scaled_linear(dims.decoder_dim, vocab_size, scale=0.25)
        self.ctc_output = (
            nn.Sequential(nn.Dropout(0.1), Linear(encoder_dim, vocab_size), nn.LogSoftmax(dim=-1))
            if dims.use_ctc
            else None
        )

    @property
    def vocab_size(self) -> int:
        """V, blank included."""
        return self.dims.vocab_size

    @property
    def context_size(self) -> int:
        """Tokens that the decoder sees."""
        return self.dims.context_size

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        """Chunk sizes that the model was trained for, in 50 Hz frames; -1 is full context."""
        return self.dims.chunk_sizes

    def encode(
        self,
        features: Tensor,
        feature_lens: Tensor,
        chunk_size: int = -1,
        left_context_frames: int = -1,
    ) -> tuple[Tensor, Tensor]:
        """Encodes whole utterances, in training or evaluation mode.

        Args:
            features: (N, T, 80) log-mel, padded with log(1e-10).
            feature_lens: (N,) int64, feature frames of each; best on the CPU, see `Batch.to`.
            chunk_size: in 50 Hz frames; -1 for full context, else the numbers of streaming.
            left_context_frames: in 50 Hz frames, used as whole chunks; -1 for all.

        Returns:
            (N, T4, C) and lengths (N,).

        Raises:
            ValueError: features of another shape or too short, or an illegal chunk size.
        """
        self.dims.check_chunk_size(chunk_size)
        if features.dim() != 3 or features.size(2) != FEATURE_DIM or features.size(1) < 9:
            raise ValueError(
                f"features have shape {tuple(features.shape)}; expected (N, T, {FEATURE_DIM}) with "
                "T >= 9 frames of 10 ms: pad or leave out shorter utterances"
            )
        x = self.encoder_embed(features)
        lengths = subsampled_length(feature_lens)
        return self.encoder(x, lengths, chunk_size, left_context_frames)

    def initial_state(
        self, batch_size: int, chunk_size: int, left_context_frames: int
    ) -> StreamingState:
        """The state of `batch_size` streams that have heard nothing.

        Args:
            batch_size: N.
            chunk_size: c, in 50 Hz frames.
            left_context_frames: in 50 Hz frames, rounded down to whole chunks.

        Raises:
            ValueError: the chunk size does not fit, or either is not finite.
        """
        self.dims.check_chunk_size(chunk_size)
        if chunk_size < 0 or left_context_frames < 0:
            raise ValueError(
                f"streaming needs a finite chunk and left context, got chunk_size={chunk_size}, "
                f"left_context_frames={left_context_frames}; -1 is for offline `encode`"
            )
        effective = left_context_frames // chunk_size * chunk_size
        device = self.simple_am_proj.weight.device
        return StreamingState(
            layers=tuple(self.encoder.initial_state(batch_size, effective)),
            embed_states=self.encoder_embed.initial_cache(batch_size),
            processed_lens=torch.zeros(batch_size, dtype=torch.int64, device=device),
            chunk_size=chunk_size,
            left_context_frames=effective,
        )

    def encode_chunk(
        self, features: Tensor, state: StreamingState, feature_lens: Tensor | None = None
    ) -> tuple[Tensor, StreamingState]:
        """Encodes the next chunk of every stream.

        Args:
            features: (N, 2c + 13, 80); the next call's begin 2c frames later.
            state: of the previous call.
            feature_lens: (N,) frames of each window that count; None for all.

        Returns:
            (N, c // 2, C) and the next state.

        Raises:
            ValueError: features do not fit the state.
        """
        expected = (state.batch_size, 2 * state.chunk_size + WINDOW_EXTRA, FEATURE_DIM)
        if tuple(features.shape) != expected:
            raise ValueError(
                f"features have shape {tuple(features.shape)}; a chunk of {state.chunk_size} "
                f"frames for {state.batch_size} streams reads {expected}; "
                "pad the end with log(1e-10)"
            )
        out, tensors = self.streaming_forward(features, state.tensors(), feature_lens)
        return out, state.with_tensors(tensors)

    def streaming_forward(
        self, features: Tensor, tensors: list[Tensor], feature_lens: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """`encode_chunk` as a function of tensors alone, to be traced for export.

        Args:
            features: (N, 2c + 13, 80).
            tensors: of a `StreamingState`, in the order of its `names()`.
            feature_lens: as in `encode_chunk`.

        Returns:
            (N, c // 2, C) and the next tensors, in the same order.
        """
        *of_layers, embed_states, processed_lens = tensors
        x, embed_states = self.encoder_embed.streaming_forward(features, embed_states)
        lengths = None
        if feature_lens is not None:
            # The ConvNeXt looks 3 embeddings ahead; those are not put out.
            lengths = subsampled_length(feature_lens) - 3
        x, layers, processed_lens = self.encoder.streaming_forward(
            x, lengths, list(group_layers(of_layers)), processed_lens
        )
        return x, [*(t for layer in layers for t in layer), embed_states, processed_lens]

    def predict(self, tokens: Tensor) -> Tensor:
        """Decoder output (N, 1, D) after the last tokens (N, context_size), -1 for none."""
        return self.decoder.predict(tokens)

    def join(self, encoder_out: Tensor, decoder_out: Tensor) -> Tensor:
        """Logits (N, 1, V) of one encoder frame (N, 1, C) and one decoder output (N, 1, D)."""
        return self.joiner(encoder_out, decoder_out)


def build_transducer(dims: TransducerDims, seed: int = 0) -> TransducerModel:
    """A freshly initialised model; the same seed gives the same weights.

    Torch's own generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TransducerModel(dims)


SIZES: dict[str, TransducerDims] = {
    # For the mini preset: trains within minutes on one core.
    "tiny": TransducerDims(
        num_encoder_layers=(1, 1, 1, 1, 1),
        downsampling_factor=(1, 2, 4, 8, 4),
        encoder_dim=(48, 64, 80, 96, 80),
        feedforward_dim=(96, 128, 192, 256, 192),
        num_heads=(4, 4, 4, 4, 4),
        query_head_dim=(12, 12, 16, 16, 16),
        value_head_dim=(8, 8, 8, 8, 8),
        pos_head_dim=(4, 4, 4, 4, 4),
        cnn_module_kernel=(15, 15, 15, 15, 15),
        vocab_size=500,
        decoder_dim=64,
        joiner_dim=64,
        pos_dim=24,
        subsampling_channels=(4, 16, 32),
        use_ctc=True,
        chunk_sizes=(8, 16, 32, -1),
        left_context_frames=(32, 64, 128),
    ),
    "small": TransducerDims(
        num_encoder_layers=(2, 2, 2, 2, 2, 2),
        downsampling_factor=(1, 2, 4, 8, 4, 2),
        encoder_dim=(64, 80, 96, 96, 96, 80),
        feedforward_dim=(128, 160, 192, 192, 192, 160),
        num_heads=(4, 4, 4, 4, 4, 4),
        query_head_dim=(16, 16, 16, 16, 16, 16),
        value_head_dim=(8, 8, 8, 8, 8, 8),
        pos_head_dim=(4, 4, 4, 4, 4, 4),
        cnn_module_kernel=(15, 15, 15, 15, 15, 15),
        vocab_size=500,
        decoder_dim=128,
        joiner_dim=128,
    ),
    "medium": TransducerDims(
        num_encoder_layers=(2, 2, 2, 2, 2, 2),
        downsampling_factor=(1, 2, 4, 8, 4, 2),
        encoder_dim=(192, 256, 256, 256, 256, 256),
        feedforward_dim=(512, 768, 768, 768, 768, 768),
        num_heads=(4, 4, 4, 8, 4, 4),
        query_head_dim=(32, 32, 32, 32, 32, 32),
        value_head_dim=(12, 12, 12, 12, 12, 12),
        pos_head_dim=(4, 4, 4, 4, 4, 4),
        cnn_module_kernel=(31, 31, 15, 15, 15, 31),
        vocab_size=500,
        decoder_dim=512,
        joiner_dim=512,
    ),
}
