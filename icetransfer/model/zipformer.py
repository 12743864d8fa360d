"""The Zipformer encoder: stacks of layers at several frame rates, causal in chunks.

Shapes: N batch, T frames of the stack at hand (T2, 20 ms, outside the stacks; T4, 40 ms, at the
output), L cached frames of left context, S = L + T keys, C channels, H heads, K convolution kernel.

Every module has a `forward` for whole sequences, in which a mask plays the part of streaming, and a
`streaming_forward` for one chunk with the caches of its left context; both give the same numbers.

Source: Zipformer paper (arXiv:2310.11230), section 3; state_dict keys as in icefall's checkpoints.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icetransfer.model import gpu
from icetransfer.model.attention import (
    AttentionWeights,
    CompactRelPositionalEncoding,
    NonlinAttention,
    SelfAttention,
    score_caps,
)
from icetransfer.model.exporting import is_exporting
from icetransfer.model.linear import Linear, scaled_linear
from icetransfer.model.scaling import (
    Balancer,
    BiasNorm,
    ScheduledFloat,
    SwooshL,
    SwooshR,
    Whiten,
    keep_inside,
    time_shared_dropout,
)


class LayerState(NamedTuple):
    """Caches of one layer between chunks; the field order is that of the ONNX inputs."""

    key: Tensor  # (L, N, H * query_head_dim)
    nonlin_attn: Tensor  # (1, N, L, 3 * C // 4)
    val1: Tensor  # (L, N, H * value_head_dim)
    val2: Tensor  # (L, N, H * value_head_dim)
    conv1: Tensor  # (N, C, K // 2)
    conv2: Tensor  # (N, C, K // 2)


class StackDims(NamedTuple):
    """Sizes of one stack, in the words of icefall's flags."""

    num_layers: int
    downsampling_factor: int
    encoder_dim: int
    feedforward_dim: int
    num_heads: int
    query_head_dim: int
    value_head_dim: int
    pos_head_dim: int
    pos_dim: int
    cnn_module_kernel: int

    @property
    def nonlin_dim(self) -> int:
        """Hidden channels of the non-linear attention."""
        return 3 * self.encoder_dim // 4


class Bypass(nn.Module):
    """A learned mix, per channel, of a module's input and output (paper, section 3.1).

    Args:
        channels: C.
        skip: fraction of the sequences that bypass the module altogether in training, by schedule.
    """

    def __init__(self, channels: int, skip: ScheduledFloat | None = None) -> None:
        super().__init__()
        self.bypass_scale = nn.Parameter(torch.full((channels,), 0.5))
        self.scale_min = ScheduledFloat((0.0, 0.9), (20000.0, 0.2))
        self.skip = skip

    def forward(self, source: Tensor, x: Tensor) -> Tensor:
        """Returns source + scale * (x - source); both (N, T, C)."""
        scale = self.bypass_scale
        if self.training:
            scale = keep_inside(scale, self.scale_min.value, 1.0)
            if self.skip is not None and self.skip.value > 0.0:
                kept = torch.rand(x.size(0), 1, 1, device=x.device) >= self.skip.value
                scale = scale * kept
        if is_exporting():
            return source + scale * (x - source)  # lerp becomes two forms and a choice
        return torch.lerp(source, x, scale)


class FeedForward(nn.Module):
    """Linear, SwooshL, Linear.

    Args:
        channels: C.
        hidden: width in between.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.in_proj = Linear(channels, hidden)
        self.balancer = Balancer(0.3, 1.0, 0.75, 5.0)
        self.activation = SwooshL()
        self.dropout = ScheduledFloat((0.0, 0.3), (20000.0, 0.1))
        self.out_proj = scaled_linear(hidden, channels, scale=0.1)
        self.whiten = Whiten(limit=7.5)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, T, C) to the same shape."""
        x = self.activation(self.balancer(self.in_proj(x)))
        if self.training:
            x = time_shared_dropout(x, self.dropout.value)
        return self.whiten(self.out_proj(x))


class ChunkCausalDepthwiseConv(nn.Module):
    """Depthwise convolution that sees all of its chunk and K // 2 frames before it.

    The sum of a causal convolution over everything and a symmetric one that sees zeros outside its
    chunk, the latter scaled frame by frame near the edges of the chunk to make up for those zeros.

    Args:
        channels: C.
        kernel: K, odd.
    """

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.left = kernel // 2
        self.chunkwise_conv_scale = nn.Parameter(torch.zeros(2, channels, kernel))
        self.causal_conv = nn.Conv1d(channels, channels, (kernel + 1) // 2, groups=channels)
        self.chunkwise_conv = nn.Conv1d(
            channels, channels, kernel, groups=channels, padding=self.left
        )

    def forward(self, x: Tensor, chunk_size: int) -> Tensor:
        """Convolves a whole sequence.

        Args:
            x: (N, T, C).
            chunk_size: frames of this stack in a chunk; below zero or above T: one chunk of T.

        Returns:
            (N, T, C).
        """
        frames = x.size(1)
        causal = self._causal(F.pad(x, (0, 0, self.left, 0)))
        if chunk_size < 0 or chunk_size >= frames:
            return causal + self._chunkwise(x.unsqueeze(1)).flatten(1, 2)
        chunks = F.pad(x, (0, 0, 0, -frames % chunk_size)).unflatten(1, (-1, chunk_size))
        return causal + self._chunkwise(chunks).flatten(1, 2)[:, :frames]

    def streaming_forward(self, x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Convolves one chunk (N, T, C) after the cache (N, C, K // 2)."""
        if is_exporting():
            return self._export_streaming(x, cache)
        joined = torch.cat([cache.transpose(1, 2), x], dim=1)
        out = self._causal(joined) + self._chunkwise(x.unsqueeze(1)).flatten(1, 2)
        return out, joined[:, joined.size(1) - self.left :].transpose(1, 2)

    def _export_streaming(self, x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        """`streaming_forward` with time last throughout, which takes two transpositions."""
        x = x.transpose(1, 2)
        joined = torch.cat([cache, x], dim=2)
        edges = self._edges(x.size(2)).t().unsqueeze(1)
        causal = time_last_conv(joined, self.causal_conv, padding=0)
        out = causal + time_last_conv(x, self.chunkwise_conv, padding=self.left) * edges
        out = out.reshape(out.size(0), out.size(1), out.size(3))
        return out.transpose(1, 2), joined[:, :, joined.size(2) - self.left :]

    def _causal(self, x: Tensor) -> Tensor:
        """Convolves (N, K // 2 + T, C) to (N, T, C)."""
        return depthwise_conv(x.unsqueeze(1), self.causal_conv, padding=0).flatten(1, 2)

    def _chunkwise(self, chunks: Tensor) -> Tensor:
        """Symmetric convolution of chunks (N, number, frames, C), scaled near both edges."""
        convolved = depthwise_conv(chunks, self.chunkwise_conv, padding=self.left)
        return convolved * self._edges(chunks.size(2))

    def _edges(self, frames: int) -> Tensor:
        """What the frames of a chunk are scaled by, (frames, C)."""
        before, after = self.chunkwise_conv_scale[0].t(), self.chunkwise_conv_scale[1].t()
        kernel = before.size(0)
        # Padding and slicing rather than a choice by length: a traced graph then fits any length.
        edges = F.pad(before, (0, 0, 0, frames))[:frames] + F.pad(after, (0, 0, frames, 0))[kernel:]
        return 1.0 + edges


def depthwise_conv(x: Tensor, conv: nn.Conv1d, padding: int) -> Tensor:
    """Runs `conv` along the third dimension of (N, number, T, C).

    As a 2-D convolution over an image that is channels-last in memory: no transposition, and
    several times faster on a CPU than the 1-D one.
    """
    y = F.conv2d(
        x.permute(0, 3, 1, 2),
        conv.weight.unsqueeze(2),
        conv.bias,
        padding=(0, padding),
        groups=conv.groups,
    )
    return y.permute(0, 2, 3, 1)


def time_last_conv(x: Tensor, conv: nn.Conv1d, padding: int) -> Tensor:
    """Runs `conv` along (N, C, T), to (N, C, 1, T); onnxruntime is slow at 1-D convolutions."""
    weight = conv.weight.unsqueeze(2)
    return F.conv2d(x.unsqueeze(2), weight, conv.bias, padding=(0, padding), groups=conv.groups)


class ConvolutionModule(nn.Module):
    """Gated linear unit, chunk-causal depthwise convolution, SwooshR, Linear.

    Args:
        channels: C.
        kernel: K.
    """

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.in_proj = Linear(channels, 2 * channels)
        self.gate_balancer = Balancer(0.05, 1.0, 0.5, 10.0)
        self.depthwise_conv = ChunkCausalDepthwiseConv(channels, kernel)
        self.conv_balancer = Balancer(0.05, 0.8, 0.2, 10.0)
        self.whiten = Whiten(limit=7.5)
        self.activation = SwooshR()
        self.out_proj = scaled_linear(channels, channels, scale=0.05)

    def forward(self, x: Tensor, padding: Tensor, chunk_size: int) -> Tensor:
        """Convolves a whole sequence.

        Args:
            x: (N, T, C).
            padding: (N, T), True where there is no frame.
            chunk_size: see `ChunkCausalDepthwiseConv.forward`.

        Returns:
            (N, T, C).
        """
        return self._finish(self.depthwise_conv(self._gate(x, padding), chunk_size))

    def streaming_forward(
        self, x: Tensor, padding: Tensor | None, cache: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Convolves one chunk (N, T, C) after the cache (N, C, K // 2)."""
        x, cache = self.depthwise_conv.streaming_forward(self._gate(x, padding), cache)
        return self._finish(x), cache

    def _gate(self, x: Tensor, padding: Tensor | None) -> Tensor:
        x = self.in_proj(x)
        value, gate = x.split(self.in_proj.out_features // 2, dim=-1)
        value = value * torch.sigmoid(self.gate_balancer(gate))
        return value if padding is None else value.masked_fill(padding.unsqueeze(-1), 0.0)

    def _finish(self, x: Tensor) -> Tensor:
        return self.out_proj(self.activation(self.whiten(self.conv_balancer(x))))


class ZipformerLayer(nn.Module):
    """One Zipformer layer (paper, figure 2).

    Args:
        dims: sizes of the stack that the layer belongs to.
    """

    def __init__(self, dims: StackDims) -> None:
        super().__init__()
        channels, hidden = dims.encoder_dim, dims.feedforward_dim
        self.dims = dims
        # Unused, but every checkpoint has it.
        self.bypass_scale = nn.Parameter(torch.full((channels,), 0.5))
        self.bypass = Bypass(channels, ScheduledFloat((0.0, 0.5), (4000.0, 0.05), (16000.0, 0.0)))
        self.bypass_mid = Bypass(channels)
        self.self_attn_weights = AttentionWeights(
            channels, dims.pos_dim, dims.num_heads, dims.query_head_dim, dims.pos_head_dim
        )
        self.self_attn1 = SelfAttention(channels, dims.num_heads, dims.value_head_dim)
        self.self_attn2 = SelfAttention(channels, dims.num_heads, dims.value_head_dim)
        self.feed_forward1 = FeedForward(channels, hidden * 3 // 4)
        self.feed_forward2 = FeedForward(channels, hidden)
        self.feed_forward3 = FeedForward(channels, hidden * 5 // 4)
        self.nonlin_attention = NonlinAttention(channels, dims.nonlin_dim)
        self.conv_module1 = ConvolutionModule(channels, dims.cnn_module_kernel)
        self.conv_module2 = ConvolutionModule(channels, dims.cnn_module_kernel)
        self.out_balancer = Balancer(0.45, 0.55, 0.2, 4.0)
        self.norm = BiasNorm(channels)
        self.out_whiten = Whiten(limit=5.0)

    def forward(
        self, x: Tensor, pos_emb: Tensor, caps: Tensor, padding: Tensor, chunk_size: int
    ) -> Tensor:
        """Transforms a whole sequence.

        Args:
            x: (N, T, C).
            pos_emb: (2T - 1, E).
            caps: from `score_caps`, broadcastable to (N, T, T).
            padding: (N, T), True where there is no frame.
            chunk_size: frames of this stack in a chunk, below zero for all.

        Returns:
            (N, T, C).
        """
        source = x
        weights = self.self_attn_weights(x, pos_emb, caps)
        x = x + self.feed_forward1(x)
        x = x + self.nonlin_attention(x, weights[0])
        x = x + self.self_attn1(x, weights)
        x = x + self.conv_module1(x, padding, chunk_size)
        x = x + self.feed_forward2(x)
        x = self.bypass_mid(source, x)
        x = x + self.self_attn2(x, weights)
        x = x + self.conv_module2(x, padding, chunk_size)
        x = x + self.feed_forward3(x)
        x = self.norm(self.out_balancer(x))
        return self.out_whiten(self.bypass(source, x))

    def streaming_forward(
        self, x: Tensor, pos_emb: Tensor, caps: Tensor, padding: Tensor | None, state: LayerState
    ) -> tuple[Tensor, LayerState]:
        """Transforms one chunk.

        Args:
            x: (N, T, C).
            pos_emb: (L + 2T - 1, E).
            caps: (N, 1, S), from `score_caps`.
            padding: (N, T), True where there is no frame; None if all are there.
            state: caches of this layer.

        Returns:
            (N, T, C) and the next caches.
        """
        source = x
        weights, key = self.self_attn_weights.streaming_forward(x, pos_emb, state.key, caps)
        x = x + self.feed_forward1(x)
        y, nonlin = self.nonlin_attention.streaming_forward(x, weights[0], state.nonlin_attn)
        x = x + y
        y, val1 = self.self_attn1.streaming_forward(x, weights, state.val1)
        x = x + y
        y, conv1 = self.conv_module1.streaming_forward(x, padding, state.conv1)
        x = x + y
        x = x + self.feed_forward2(x)
        x = self.bypass_mid(source, x)
        y, val2 = self.self_attn2.streaming_forward(x, weights, state.val2)
        x = x + y
        y, conv2 = self.conv_module2.streaming_forward(x, padding, state.conv2)
        x = x + y
        x = x + self.feed_forward3(x)
        x = self.bypass(source, self.norm(x))
        return x, LayerState(key, nonlin, val1, val2, conv1, conv2)

    def initial_state(self, batch_size: int, left_context: int) -> LayerState:
        """Zero caches for `batch_size` streams and `left_context` frames of this stack."""
        dims, new = self.dims, self.bypass_scale.new_zeros
        value_dim = dims.num_heads * dims.value_head_dim
        conv = (batch_size, dims.encoder_dim, dims.cnn_module_kernel // 2)
        return LayerState(
            key=new(left_context, batch_size, dims.num_heads * dims.query_head_dim),
            nonlin_attn=new(1, batch_size, left_context, dims.nonlin_dim),
            val1=new(left_context, batch_size, value_dim),
            val2=new(left_context, batch_size, value_dim),
            conv1=new(conv),
            conv2=new(conv),
        )


class ZipformerStack(nn.Module):
    """Layers at one frame rate.

    Args:
        dims: sizes.
    """

    def __init__(self, dims: StackDims) -> None:
        super().__init__()
        self.encoder_pos = CompactRelPositionalEncoding(dims.pos_dim)
        self.layers = nn.ModuleList(ZipformerLayer(dims) for _ in range(dims.num_layers))

    def forward(self, x: Tensor, hidden: Tensor, padding: Tensor, chunk_size: int) -> Tensor:
        """Transforms a whole sequence.

        Args:
            x: (N, T, C).
            hidden: True where a key may not be seen, broadcastable to (N, T, T).
            padding: (N, T), True where there is no frame.
            chunk_size: frames of this stack in a chunk, below zero for all.

        Returns:
            (N, T, C).
        """
        pos_emb, caps = self.encoder_pos(x), score_caps(hidden, x.dtype)
        for layer in self.layers:
            x = layer(x, pos_emb, caps, padding, chunk_size)
        return x

    def streaming_forward(
        self, x: Tensor, hidden: Tensor, states: list[LayerState], whole: bool
    ) -> tuple[Tensor, list[LayerState]]:
        """Transforms one chunk.

        Args:
            x: (N, T, C).
            hidden: (N, 1, S), True where a key may not be seen.
            states: of each layer.
            whole: every frame of the chunk is there.

        Returns:
            (N, T, C) and the next states.
        """
        left = hidden.size(2) - x.size(1)
        pos_emb, caps = self.encoder_pos(x, left), score_caps(hidden, x.dtype)
        padding = None if whole else hidden[:, 0, left:]
        new_states = []
        for layer, state in zip(self.layers, states, strict=True):
            x, new_state = layer.streaming_forward(x, pos_emb, caps, padding, state)
            new_states.append(new_state)
        return x, new_states


class Downsample(nn.Module):
    """Weighted mean of groups of frames; the last frame is repeated to fill the last group.

    Args:
        factor: frames in a group.
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.bias = nn.Parameter(torch.zeros(factor))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, T, C) to (N, ceil(T / factor), C)."""
        missing = -x.size(1) % self.factor
        if is_exporting() or missing > 0:
            x = torch.cat([x, x[:, -1:].expand(x.size(0), missing, x.size(2))], dim=1)
        return self.whole_groups(x)

    def whole_groups(self, x: Tensor) -> Tensor:
        """`forward` where no group lacks a frame, as in a chunk."""
        groups = x.reshape(x.size(0), x.size(1) // self.factor, self.factor, x.size(2))
        return (groups * self.bias.softmax(dim=0).unsqueeze(-1)).sum(dim=2)


def upsample(x: Tensor, factor: int, frames: int) -> Tensor:
    """Repeats every frame of (N, T, C) `factor` times and keeps the first `frames`."""
    slow = x.size(1)
    x = x.unsqueeze(2).expand(-1, -1, factor, -1)
    return x.reshape(x.size(0), slow * factor, x.size(3))[:, :frames]


class DownsampledStack(nn.Module):
    """A stack at a lower frame rate, mixed back into its input.

    Args:
        dims: sizes.
    """

    def __init__(self, dims: StackDims) -> None:
        super().__init__()
        self.factor = dims.downsampling_factor
        self.downsample = Downsample(self.factor)
        self.encoder = ZipformerStack(dims)
        self.out_combiner = Bypass(dims.encoder_dim)

    def forward(self, x: Tensor, hidden: Tensor, padding: Tensor, chunk_size: int) -> Tensor:
        """Transforms a whole sequence; arguments as in `ZipformerStack.forward`, at 50 Hz."""
        step = self.factor
        chunk = chunk_size // step if chunk_size > 0 else chunk_size
        y = self.encoder(self.downsample(x), hidden[:, ::step, ::step], padding[:, ::step], chunk)
        return self.out_combiner(x, upsample(y, step, x.size(1)))

    def streaming_forward(
        self, x: Tensor, hidden: Tensor, states: list[LayerState], whole: bool
    ) -> tuple[Tensor, list[LayerState]]:
        """Transforms one chunk; arguments as in `ZipformerStack`, at 50 Hz."""
        slow = self.downsample.whole_groups(x)
        y, states = self.encoder.streaming_forward(
            slow, hidden[:, :, :: self.factor], states, whole
        )
        return self.out_combiner(x, upsample(y, self.factor, x.size(1))), states


class Zipformer(nn.Module):
    """Stacks at several frame rates; from 50 Hz embeddings to 25 Hz outputs.

    Args:
        stacks: sizes of each.
    """

    def __init__(self, stacks: list[StackDims]) -> None:
        super().__init__()
        self.stacks = stacks
        self.encoders = nn.ModuleList(
            DownsampledStack(dims) if dims.downsampling_factor > 1 else ZipformerStack(dims)
            for dims in stacks
        )
        self.downsample_output = Downsample(2)

    def forward(
        self, x: Tensor, lengths: Tensor, chunk_size: int, left_context_frames: int
    ) -> tuple[Tensor, Tensor]:
        """Encodes whole sequences.

        Args:
            x: (N, T2, C).
            lengths: (N,) embeddings that count, here or on the CPU.
            chunk_size: in 50 Hz frames, below zero for full context.
            left_context_frames: in 50 Hz frames, below zero for everything before.

        Returns:
            (N, T4, C) and lengths (N,), where those given are.
        """
        own = lengths.to(x.device, non_blocking=True)
        outputs = []
        if gpu.takes_kernels(x):
            layers = gpu.kernels("model.layer")
            gpu.refresh_halves()
            for i, stack in enumerate(self.encoders):
                x = self._fit(x, i)
                x = layers.run_stack(stack, x, own, chunk_size, left_context_frames)
                outputs.append(x)
        else:
            frames = torch.arange(x.size(1), device=x.device)
            padding = frames >= own.unsqueeze(1)
            hidden = padding.unsqueeze(1)
            if chunk_size > 0:
                hidden = hidden | chunk_mask(frames, chunk_size, left_context_frames)
            for i, stack in enumerate(self.encoders):
                x = stack(self._fit(x, i), hidden, padding, chunk_size)
                outputs.append(x)
        return self.downsample_output(self._combine(outputs)), (lengths + 1) // 2

    def streaming_forward(
        self, x: Tensor, lengths: Tensor | None, states: list[LayerState], processed_lens: Tensor
    ) -> tuple[Tensor, list[LayerState], Tensor]:
        """Encodes one chunk.

        Args:
            x: (N, c, C), c embeddings.
            lengths: (N,) embeddings that count, or None for all.
            states: of every layer, in order.
            processed_lens: (N,) embeddings seen before.

        Returns:
            (N, c // 2, C), the next states and the next processed_lens.
        """
        chunk, left = x.size(1), states[0].key.size(0) * self.stacks[0].downsampling_factor
        back = torch.arange(left, 0, -1, device=x.device)  # distance of a cached frame from now
        unseen = back > processed_lens.unsqueeze(1)
        if lengths is None:
            missing = torch.zeros_like(processed_lens).bool().unsqueeze(1).expand(-1, chunk)
            processed_lens = processed_lens + chunk
        else:
            missing = torch.arange(chunk, device=x.device) >= lengths.unsqueeze(1)
            processed_lens = processed_lens + lengths
        hidden = torch.cat([unseen, missing], dim=1).unsqueeze(1)
        outputs, new_states = [], []
        for i, stack in enumerate(self.encoders):
            own = states[len(new_states) : len(new_states) + self.stacks[i].num_layers]
            x, own = stack.streaming_forward(self._fit(x, i), hidden, own, lengths is None)
            outputs.append(x)
            new_states.extend(own)
        x = self.downsample_output.whole_groups(self._combine(outputs))
        return x, new_states, processed_lens

    def initial_state(self, batch_size: int, left_context_frames: int) -> list[LayerState]:
        """Zero caches of every layer; `left_context_frames` at 50 Hz."""
        return [
            layer.initial_state(batch_size, left_context_frames // dims.downsampling_factor)
            for dims, stack in zip(self.stacks, self.encoders, strict=True)
            for layer in (stack.encoder if dims.downsampling_factor > 1 else stack).layers
        ]

    def _fit(self, x: Tensor, stack: int) -> Tensor:
        """Cuts or zero-pads the channels of the previous output (N, T2, C) for `stack`."""
        missing = self.stacks[stack].encoder_dim - self.stacks[max(stack - 1, 0)].encoder_dim
        return F.pad(x, (0, missing)) if missing else x

    def _combine(self, outputs: list[Tensor]) -> Tensor:
        """Joins the last output with the channels that only wider, earlier stacks have."""
        pieces, have = [], 0
        for dims, x in zip(reversed(self.stacks), reversed(outputs), strict=True):
            if dims.encoder_dim > have:
                pieces.append(x[:, :, have:])
                have = dims.encoder_dim
        return torch.cat(pieces, dim=2)


def chunk_mask(frames: Tensor, chunk_size: int, left_context_frames: int) -> Tensor:
    """Which keys a query may not see when it arrives in chunks.

    Args:
        frames: (T,) positions 0 to T - 1.
        chunk_size: frames in a chunk.
        left_context_frames: used as whole chunks, rounded down; below zero for no limit.

    Returns:
        (T, T), True where the key lies in a later chunk or too many chunks before.
    """
    chunks = frames // chunk_size
    ahead = chunks - chunks.unsqueeze(1)
    hidden = ahead > 0
    if left_context_frames >= 0:
        hidden = hidden | (ahead < -(left_context_frames // chunk_size))
    return hidden
