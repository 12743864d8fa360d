"""Attention of the Zipformer: weights computed once a layer, used by three modules.

Shapes: N batch, T queries (frames of this stack), L cached frames of left context, S = L + T keys,
C channels, H heads, Q query dim per head, P position dim per head, V value dim per head,
R = S + T - 1 relative positions, E dimension of the position encoding.

Source: Zipformer paper (arXiv:2310.11230), sections 3.1 and 3.2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icetransfer.model.exporting import is_exporting
from icetransfer.model.linear import Linear, scaled_linear
from icetransfer.model.scaling import Balancer, Whiten

MASKED_SCORE = -1000.0


class CompactRelPositionalEncoding(nn.Module):
    """Encoding of relative positions with most of its resolution near zero.

    The offset is squeezed by a signed logarithm and then by an arc tangent into (-pi/2, pi/2), and
    a Fourier basis of that angle is returned; the last channel is 1, as a bias for the projection.

    Args:
        dim: E.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self._reach = 0
        self._table = torch.empty(0)  # not a buffer: checkpoints hold parameters only

    def forward(self, x: Tensor, left_context: int = 0) -> Tensor:
        """Encodes key-minus-query offsets from -(L + T - 1) to T - 1.

        Args:
            x: (N, T, C), read for its length, device and type only.
            left_context: L.

        Returns:
            (R, E).
        """
        queries = x.size(1)
        keys = queries + left_context
        if is_exporting():
            return self.encode(torch.arange(1 - keys, queries, device=x.device, dtype=x.dtype))
        if keys > self._reach or self._table.device != x.device or self._table.dtype != x.dtype:
            self._reach = max(keys, 2 * self._reach)
            offsets = torch.arange(1 - self._reach, self._reach, device=x.device, dtype=x.dtype)
            self._table = self.encode(offsets)
        return self._table[self._reach - keys : self._reach + queries - 1]

    def encode(self, offsets: Tensor) -> Tensor:
        """Encodes a row of offsets (R,) as (R, E)."""
        squeeze = math.sqrt(self.dim)
        logs = torch.log(offsets.abs() + squeeze) - math.log(squeeze)
        angles = torch.atan(squeeze * offsets.sign() * logs * (2.0 * math.pi / self.dim))
        angles = angles.unsqueeze(1) * torch.arange(
            1, self.dim // 2 + 1, device=offsets.device, dtype=offsets.dtype
        )
        waves = torch.stack([angles.cos(), angles.sin()], dim=2).flatten(1)
        return torch.cat([waves[:, :-1], torch.ones_like(waves[:, :1])], dim=1)


def shift_to_keys(scores: Tensor, keys: int) -> Tensor:
    """Turns scores by offset into scores by key with plain operations.

    Args:
        scores: (H, N, T, R); entry r of query i belongs to key r - (T - 1) + i.
        keys: S.

    Returns:
        (H, N, T, S).
    """
    heads, batch, queries, offsets = scores.shape
    if keys > queries == 1:
        return scores
    if keys == queries:  # whole utterances: of one frame, there is no column to go without
        scores, offsets = F.pad(scores, (0, 1)), offsets + 1
    # Rows read one column shorter: each row starts one key further left.
    flat = scores.reshape(heads, batch, queries * offsets)
    flat = flat[..., queries - 1 : queries * offsets - 1]
    return flat.reshape(heads, batch, queries, offsets - 1)[..., :keys]


class _CappedSoftmax(torch.autograd.Function):
    """softmax(min(content + shifted position scores, caps)); keeps only the weights.

    The shift is a strided view, so nothing of size (H, N, T, R) is copied.
    """

    @staticmethod
    def forward(ctx: Any, content: Tensor, position: Tensor, caps: Tensor) -> Tensor:
        scores = content + _by_key(position, content.size(-1))
        weights = torch.softmax(torch.minimum(scores, caps, out=scores), dim=-1)
        ctx.save_for_backward(weights, caps)
        ctx.position_shape = position.shape
        return weights

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, caps = ctx.saved_tensors
        grad_content = torch.ops.aten._softmax_backward_data(grad, weights, -1, weights.dtype)
        # Hidden keys have weight and gradient zero, but for queries to which every key is hidden.
        grad_content.mul_((caps > MASKED_SCORE).to(grad.dtype))
        grad_position = grad.new_zeros(ctx.position_shape)
        _by_key(grad_position, weights.size(-1)).copy_(grad_content)
        return grad_content, grad_position, None


def score_caps(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Upper limits of attention scores: MASKED_SCORE where `hidden`, else infinity.

    Taking a minimum does what filling in MASKED_SCORE would, ten times faster on a CPU.
    """
    caps = torch.full_like(hidden, float("inf"), dtype=dtype)
    return caps.masked_fill(hidden, MASKED_SCORE)


def _by_key(position: Tensor, keys: int) -> Tensor:
    """Views contiguous (H, N, T, R) position scores as (H, N, T, S), shifted to the keys."""
    heads, batch, queries, offsets = position.shape
    strides = (batch * queries * offsets, queries * offsets, offsets - 1, 1)
    start = position.storage_offset() + queries - 1
    return position.as_strided((heads, batch, queries, keys), strides, start)


class AttentionWeights(nn.Module):
    """Multi-head attention weights with relative positions.

    Args:
        channels: C.
        pos_dim: E.
        num_heads: H.
        query_head_dim: Q.
        pos_head_dim: P.
    """

    def __init__(
        self, channels: int, pos_dim: int, num_heads: int, query_head_dim: int, pos_head_dim: int
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_dim = num_heads * query_head_dim
        in_dim = num_heads * (2 * query_head_dim + pos_head_dim)
        self.in_proj = scaled_linear(channels, in_dim, scale=query_head_dim**-0.25)
        self.linear_pos = scaled_linear(pos_dim, num_heads * pos_head_dim, scale=0.05, bias=False)
        self.key_whiten = Whiten(limit=3.0)

    def forward(self, x: Tensor, pos_emb: Tensor, caps: Tensor) -> Tensor:
        """Attention weights of a whole sequence.

        Args:
            x: (N, T, C).
            pos_emb: (2T - 1, E).
            caps: from `score_caps`, broadcastable to (N, T, T).

        Returns:
            (H, N, T, T), rows summing to 1.
        """
        query, key, position = self._project(x)
        return self._weights(query, by_head(key, self.num_heads), position, pos_emb, caps)

    def streaming_forward(
        self, x: Tensor, pos_emb: Tensor, cached_key: Tensor, caps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attention weights of one chunk over its left context and itself.

        Args:
            x: (N, T, C).
            pos_emb: (L + 2T - 1, E).
            cached_key: (L, N, H * Q).
            caps: (N, 1, S), from `score_caps`.

        Returns:
            Weights (H, N, T, S) and the next cached_key.
        """
        query, key, position = self._project(x)
        key, cached_key = extend_cache(cached_key, key)
        key = split_heads(key, self.num_heads).permute(2, 1, 0, 3)
        return self._weights(query, key, position, pos_emb, caps), cached_key

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sizes = (self.query_dim, self.query_dim, self.in_proj.out_features - 2 * self.query_dim)
        query, key, position = self.in_proj(x).split(sizes, dim=-1)
        return query, self.key_whiten(key), position

    def _weights(
        self, query: Tensor, key: Tensor, position: Tensor, pos_emb: Tensor, caps: Tensor
    ) -> Tensor:
        """Weights of query (N, T, H * Q) over key (H, N, S, Q); position (N, T, H * P)."""
        query, position = by_head(query, self.num_heads), by_head(position, self.num_heads)
        content = torch.matmul(query, key.transpose(2, 3))
        heads, batch, queries, keys = content.shape
        offsets = self.linear_pos(pos_emb)  # (R, H * P)
        offsets = split_heads(offsets, self.num_heads).permute(1, 2, 0)  # (H, P, R)
        position = torch.matmul(position.flatten(1, 2), offsets)
        position = position.reshape(heads, batch, queries, offsets.size(2))
        if is_exporting():
            scores = content + shift_to_keys(position, keys)
            return torch.softmax(torch.minimum(scores, caps), dim=-1)
        return _CappedSoftmax.apply(content, position, caps)


class SelfAttention(nn.Module):
    """Values averaged with given attention weights.

    Args:
        channels: C.
        num_heads: H.
        value_head_dim: V.
    """

    def __init__(self, channels: int, num_heads: int, value_head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj = Linear(channels, num_heads * value_head_dim)
        self.out_proj = scaled_linear(num_heads * value_head_dim, channels, scale=0.05)
        self.whiten = Whiten(limit=7.5)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """Maps (N, T, C) with weights (H, N, T, T) to (N, T, C)."""
        return self._attend(by_head(self.in_proj(x), self.num_heads), weights)

    def streaming_forward(
        self, x: Tensor, weights: Tensor, cached_val: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Maps one chunk (N, T, C) with weights (H, N, T, S) and cached_val (L, N, H * V)."""
        value, cached_val = extend_cache(cached_val, self.in_proj(x))
        value = split_heads(value, self.num_heads).permute(2, 1, 0, 3)
        return self._attend(value, weights), cached_val

    def _attend(self, value: Tensor, weights: Tensor) -> Tensor:
        x = torch.matmul(weights, value).permute(1, 2, 0, 3)  # (N, T, H, V)
        x = x.reshape(x.size(0), x.size(1), self.out_proj.in_features)
        return self.whiten(self.out_proj(x))


class NonlinAttention(nn.Module):
    """Gated attention with the weights of the layer's first head (paper, section 3.1).

    Args:
        channels: C.
        hidden: channels averaged over time.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.in_proj = Linear(channels, 3 * hidden)
        self.gate_balancer = Balancer(0.25, 0.75, 0.5, 5.0)
        self.out_proj = scaled_linear(hidden, channels, scale=0.05)
        self.whiten = Whiten(limit=7.5)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """Maps (N, T, C) with weights (N, T, T) to (N, T, C)."""
        value, gate = self._project(x)
        return self._attend(value, gate, weights)

    def streaming_forward(
        self, x: Tensor, weights: Tensor, cached: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Maps one chunk (N, T, C) with weights (N, T, S) and the cache (1, N, L, hidden)."""
        value, gate = self._project(x)
        value = torch.cat([cached.flatten(0, 1), value], dim=1)
        new_cached = value[:, value.size(1) - cached.size(2) :].unsqueeze(0)
        return self._attend(value, gate, weights), new_cached

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inner_gate, value, gate = self.in_proj(x).split(self.out_proj.in_features, dim=-1)
        return value * self.gate_balancer(inner_gate).tanh(), gate

    def _attend(self, value: Tensor, gate: Tensor, weights: Tensor) -> Tensor:
        return self.whiten(self.out_proj(torch.matmul(weights, value) * gate))


def by_head(x: Tensor, num_heads: int) -> Tensor:
    """Views (N, T, H * D) as (H, N, T, D)."""
    return split_heads(x, num_heads).permute(2, 0, 1, 3)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Views (..., H * D) as (..., H, D), by sizes that a traced graph knows."""
    before = [x.size(i) for i in range(x.dim() - 1)]  # not shape[:-1], which traces as constants
    return x.reshape(*before, num_heads, x.size(-1) // num_heads)


def extend_cache(cache: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Puts the cached frames (L, N, D) before `x` (N, T, D).

    Returns:
        (L + T, N, D) and the next cache, the last L of its frames.
    """
    joined = torch.cat([cache, x.transpose(0, 1)], dim=0)
    return joined, joined[joined.size(0) - cache.size(0) :]
