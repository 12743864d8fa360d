"""A Zipformer stack as a GPU computes it: few launches, few passes over memory, the same numbers.

`zipformer.py` and `attention.py` say what is computed.  Here each module is one function with a
backward pass of its own: matrix products by torch, all else by the kernels of `kernels/`.
The bias of a module's last map is added with its output to the residual stream.

The stream is a pair: in float32 and, for matrix products, in the type of autocast.

Shapes: N batch, T frames, C channels, H heads, D value dim per head, R relative positions, E
dimension of the position encoding.
"""

from __future__ import annotations

import math
import random
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from icetransfer.model.gpu import half, working_type
from icetransfer.model.kernels import attention, convolution, gates, stream
from icetransfer.model.kernels.attention import Heads, Use
from icetransfer.model.kernels.common import Sight, column_sums, mm32
from icetransfer.model.kernels.convolution import ConvWeights
from icetransfer.model.kernels.stream import Skip
from icetransfer.model.swoosh import SWOOSH_L, SWOOSH_R

ALL_LEFT = -1
NO_LIMITS = (-math.inf, math.inf)


class Stream(NamedTuple):
    """What modules add to (float32), and what they read (the type of matrix products)."""

    full: Tensor
    half: Tensor


def run_stack(stack: Any, x: Tensor, lengths: Tensor, chunk_size: int, left_context: int) -> Tensor:
    """`ZipformerStack.forward` or `DownsampledStack.forward`.

    Args:
        stack: either.
        x: (N, T, C) at 50 Hz.
        lengths: (N,) frames that count.
        chunk_size: in 50 Hz frames, below zero for all.
        left_context: in 50 Hz frames, below zero for all.

    Returns:
        (N, T, C) float32.
    """
    x, dtype, factor = x.float(), working_type(x), getattr(stack, "factor", 1)
    limited = chunk_size > 0 and left_context >= 0
    sight = Sight(
        lengths=lengths,
        step=factor,
        chunk=max(chunk_size // factor, 0),
        left=left_context // chunk_size if limited else ALL_LEFT,
    )
    if factor == 1:
        return _run_layers(stack, Stream(x, x.to(dtype)), sight)
    slow = _Downsample.apply(x.contiguous(), stack.downsample.bias, dtype)
    y = _run_layers(stack.encoder, Stream(*slow), sight)
    bypass = stack.out_combiner
    return _Combine.apply(x, y, bypass.bypass_scale, factor, _limits(bypass))


def _run_layers(stack: Any, x: Stream, sight: Sight) -> Tensor:
    position = stack.encoder_pos(x.full).to(x.half.dtype)
    for layer in stack.layers:
        x = run_layer(layer, x, position, sight)
    return x.full


def run_layer(layer: Any, x: Stream, position: Tensor, sight: Sight) -> Stream:
    """`ZipformerLayer.forward`.

    Args:
        layer: the module.
        x: (N, T, C).
        position: (R, E), of the type of `x.half`.
        sight: at the rate of the stack.

    Returns:
        (N, T, C).
    """
    source, uses = x.full, []
    weights = _weights(layer.self_attn_weights, x.half, position, sight, uses)
    x = _add(x, _feed_forward(layer.feed_forward1, x.half), layer.feed_forward1)
    x = _add(
        x, _nonlin(layer.nonlin_attention, x.half, weights, sight, uses), layer.nonlin_attention
    )
    x = _add(x, _attend(layer.self_attn1, x.half, weights, sight, uses), layer.self_attn1)
    x = _add(x, _convolve(layer.conv_module1, x.half, sight), layer.conv_module1)
    y = _feed_forward(layer.feed_forward2, x.half)
    bias, bypass = layer.feed_forward2.out_proj.bias, layer.bypass_mid
    x = Stream(*_Mix.apply(source, x.full, y, bias, bypass.bypass_scale, _skip(bypass)))
    x = _add(x, _attend(layer.self_attn2, x.half, weights, sight, uses), layer.self_attn2)
    x = _add(x, _convolve(layer.conv_module2, x.half, sight), layer.conv_module2)
    y = _feed_forward(layer.feed_forward3, x.half)
    bias, bypass, norm = layer.feed_forward3.out_proj.bias, layer.bypass, layer.norm
    return Stream(
        *_NormMix.apply(
            layer, source, x.full, y, bias, bypass.bypass_scale, norm.bias, norm.log_scale,
            _skip(bypass),
        )
    )  # fmt: skip


def _skip(bypass: Any) -> Skip:
    share = bypass.skip.value if bypass.training and bypass.skip is not None else 0.0
    return Skip(_seed() if share > 0.0 else 0, share, *_limits(bypass))


def _limits(bypass: Any) -> tuple[float, float]:
    """Where training keeps the scale of a bypass."""
    return (bypass.scale_min.value, 1.0) if bypass.training else NO_LIMITS


def _seed() -> int:
    """Of what a kernel draws; itself drawn on the host, without torch."""
    return random.getrandbits(31)


def _weights_grad(wanted: bool, grad: Tensor, x: Tensor) -> Tensor | None:
    """The gradient of a map's weight from that of its output and its input."""
    return mm32(grad.flatten(0, -2).t(), x.flatten(0, -2)) if wanted else None


# ------------------------------------------------------------------------------ the residual stream


def _add(x: Stream, y: Tensor, module: Any) -> Stream:
    return Stream(*_Residual.apply(x.full, y, module.out_proj.bias))


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, full: Tensor, y: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.dtype = y.dtype
        return stream.residual(full, y, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_full: Tensor, of_half: Tensor | None) -> tuple[Tensor, ...]:
        return stream.residual_grad(of_full, of_half, ctx.dtype)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, source: Tensor, full: Tensor, y: Tensor, bias: Tensor, scale: Tensor, skip: Skip
    ) -> tuple[Tensor, Tensor]:
        out, out_half, change = stream.mix(source, full, y, bias, scale, skip)
        ctx.save_for_backward(change, scale)
        ctx.skip = skip
        return out, out_half

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_full: Tensor, of_half: Tensor) -> tuple[Tensor | None, ...]:
        change, scale = ctx.saved_tensors
        of_source, of_x, of_y, sums = stream.mix_grad(of_full, of_half, change, scale, ctx.skip)
        return of_source, of_x, of_y, sums[1], sums[0], None


class _NormMix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layer: Any, source: Tensor, full: Tensor, y: Tensor, bias: Tensor, scale: Tensor,
        centre: Tensor, log_scale: Tensor, skip: Skip,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        out, out_half, x, change, norm = stream.norm_mix(
            source, full, y, bias, scale, centre, log_scale, skip
        )
        ctx.skip = skip
        ctx.limits = layer.norm.LOG_SCALE_LIMITS if layer.training else NO_LIMITS
        ctx.balancer = layer.out_balancer if layer.out_balancer.drawn() else None
        ctx.whiten = layer.out_whiten if layer.out_whiten.drawn() else None
        whitened = out_half if ctx.whiten else None
        ctx.save_for_backward(change, x, norm, scale, centre, log_scale, whitened)
        return out, out_half

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_full: Tensor, of_half: Tensor | None) -> tuple[Tensor | None, ...]:
        *saved, whitened = ctx.saved_tensors
        if ctx.whiten:
            of_full = of_full if of_half is None else of_full + of_half
            of_full, of_half = ctx.whiten.adjust(whitened, of_full), None
        of_source, of_x, of_y, sums = stream.norm_mix_grad(
            of_full, of_half, tuple(saved), ctx.skip, ctx.limits
        )
        channels = of_x.size(-1)
        of_scale, of_centre, of_bias, of_log_scale = sums.split([channels] * 3 + [1])
        if ctx.balancer:
            of_x, of_y, of_bias = stream.residual_grad(
                ctx.balancer.adjust_in_place(saved[1], of_x), None, of_y.dtype
            )
        return (
            None, of_source, of_x, of_y, of_bias, of_scale, of_centre, of_log_scale.view(()), None,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------ modules


def _feed_forward(module: Any, x: Tensor) -> Tensor:
    first, second = module.in_proj, module.out_proj
    return _FeedForward.apply(module, x, first.weight, first.bias, second.weight)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, module: Any, x: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor
    ) -> Tensor:
        hidden = F.linear(x, half(weight, x.dtype), half(bias, x.dtype))
        rate = module.dropout.value if module.training else 0.0
        ctx.dropout = (rate, _seed() if rate > 0.0 else 0)
        active = gates.swoosh_dropout(hidden, SWOOSH_L, *ctx.dropout)
        y = F.linear(active, half(out_weight, x.dtype))
        ctx.balancer = module.balancer if module.balancer.drawn() else None
        ctx.whiten = module.whiten if module.whiten.drawn() else None
        ctx.save_for_backward(x, hidden, weight, out_weight, y if ctx.whiten else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, weight, out_weight, y = ctx.saved_tensors
        if ctx.whiten:
            grad = ctx.whiten.adjust(y, grad)
        of_active = grad @ half(out_weight, x.dtype)
        active, of_hidden, of_bias = gates.swoosh_dropout_grad(
            hidden, of_active, SWOOSH_L, *ctx.dropout
        )
        if ctx.balancer:
            of_hidden = ctx.balancer.adjust_in_place(hidden, of_hidden)
            of_bias = column_sums(of_hidden)
        _, _, for_weight, _, for_out_weight = ctx.needs_input_grad
        return (
            None,
            of_hidden @ half(weight, x.dtype),
            _weights_grad(for_weight, of_hidden, x),
            of_bias,
            _weights_grad(for_out_weight, grad, active),
        )


def _convolve(module: Any, x: Tensor, sight: Sight) -> Tensor:
    conv = module.depthwise_conv
    return _Convolution.apply(
        module, x, sight, module.in_proj.weight, module.in_proj.bias, conv.causal_conv.weight,
        conv.causal_conv.bias, conv.chunkwise_conv.weight, conv.chunkwise_conv.bias,
        conv.chunkwise_conv_scale, module.out_proj.weight,
    )  # fmt: skip


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, module: Any, x: Tensor, sight: Sight, weight: Tensor, bias: Tensor,
        causal: Tensor, causal_bias: Tensor, chunkwise: Tensor, chunk_bias: Tensor, scale: Tensor,
        out_weight: Tensor,
    ) -> Tensor:  # fmt: skip
        projected = F.linear(x, half(weight, x.dtype), half(bias, x.dtype))
        gated = gates.glu(projected, sight)
        of_conv = ConvWeights(causal, causal_bias, chunkwise, chunk_bias, scale)
        ctx.chunk = min(sight.chunk or x.size(1), x.size(1))
        convolved, active = convolution.conv(gated, of_conv, ctx.chunk, SWOOSH_R)
        ctx.sight = sight
        ctx.gate_balancer = module.gate_balancer if module.gate_balancer.drawn() else None
        ctx.balancer = module.conv_balancer if module.conv_balancer.drawn() else None
        ctx.whiten = module.whiten if module.whiten.drawn() else None
        ctx.save_for_backward(x, projected, gated, convolved, weight, out_weight, *of_conv)
        return F.linear(active, half(out_weight, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, projected, gated, convolved, weight, out_weight, *of_conv = ctx.saved_tensors
        conv = ConvWeights(*of_conv)
        of_active = grad @ half(out_weight, x.dtype)
        active, of_convolved, _ = gates.swoosh_dropout_grad(convolved, of_active, SWOOSH_R)
        if ctx.whiten:
            of_convolved = ctx.whiten.adjust(convolved, of_convolved)
        if ctx.balancer:
            of_convolved = ctx.balancer.adjust_in_place(convolved, of_convolved)
        needed = ctx.needs_input_grad
        of_projected, of_bias, of_conv = convolution.conv_grad(
            of_convolved, conv, ctx.chunk, gated, projected, ctx.sight, any(needed[5:10])
        )
        if ctx.gate_balancer:
            channels = gated.size(-1)
            ctx.gate_balancer.adjust_in_place(
                projected[..., channels:], of_projected[..., channels:]
            )
            of_bias = column_sums(of_projected)
        return (
            None,
            of_projected @ half(weight, x.dtype),
            None,
            _weights_grad(needed[3], of_projected, x),
            of_bias,
            *(of_conv or [None] * len(conv)),
            _weights_grad(needed[10], grad, active),
        )


# ---------------------------------------------------------------------------------------- attention


def _weights(module: Any, x: Tensor, position: Tensor, sight: Sight, uses: list[Use]) -> Tensor:
    first = module.in_proj
    return _AttentionWeights.apply(
        module, x, position, sight, uses, first.weight, first.bias, module.linear_pos.weight
    )


class _AttentionWeights(torch.autograd.Function):
    """Attention weights, whose gradient is never made.

    Each module that uses the weights leaves in `uses` what the gradient follows from.  Autograd
    calls this function's backward pass when all of theirs have run, though it passes nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, module: Any, x: Tensor, position: Tensor, sight: Sight, uses: list[Use],
        weight: Tensor, bias: Tensor, for_position: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.set_materialize_grads(False)
        proj = F.linear(x, half(weight, x.dtype), half(bias, x.dtype))
        offsets = half(for_position, x.dtype) @ position.t()
        heads = module.num_heads
        query = module.query_dim // heads
        ctx.heads = Heads(heads, query, proj.size(2) // heads - 2 * query)
        ctx.sight, ctx.uses = sight, uses
        weights = attention.attention_weights(proj, offsets, ctx.heads, sight)
        ctx.whiten = module.key_whiten if module.key_whiten.drawn() else None
        ctx.save_for_backward(x, position, proj, offsets, weights, weight)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: None) -> tuple[Tensor | None, ...]:
        x, position, proj, offsets, weights, weight = ctx.saved_tensors
        uses = tuple(ctx.uses)
        ctx.uses.clear()
        of_proj, of_offsets = attention.attention_weights_grad(
            weights, proj, offsets, uses, ctx.heads, ctx.sight
        )
        if ctx.whiten:
            width = ctx.heads.count * ctx.heads.query
            keys = slice(width, 2 * width)
            adjusted = ctx.whiten.adjust(
                proj[..., keys].contiguous(), of_proj[..., keys].contiguous()
            )
            of_proj[..., keys] = adjusted
        needed = ctx.needs_input_grad
        return (
            None,
            of_proj @ half(weight, x.dtype),
            None,
            None,
            None,
            _weights_grad(needed[5], of_proj, x),
            column_sums(of_proj) if needed[6] else None,
            of_offsets @ position.float() if needed[7] else None,
        )


def _attend(module: Any, x: Tensor, weights: Tensor, sight: Sight, uses: list[Use]) -> Tensor:
    first, second = module.in_proj, module.out_proj
    return _SelfAttention.apply(
        module, x, weights, sight, uses, first.weight, first.bias, second.weight
    )


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, module: Any, x: Tensor, weights: Tensor, sight: Sight, uses: list[Use],
        weight: Tensor, bias: Tensor, out_weight: Tensor,
    ) -> Tensor:  # fmt: skip
        value = F.linear(x, half(weight, x.dtype), half(bias, x.dtype))
        out = attention.attend(weights, value, module.num_heads, sight)
        y = F.linear(out, half(out_weight, x.dtype))
        ctx.heads, ctx.sight, ctx.uses = module.num_heads, sight, uses
        ctx.whiten = module.whiten if module.whiten.drawn() else None
        ctx.save_for_backward(x, weights, value, out, weight, out_weight, y if ctx.whiten else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, value, out, weight, out_weight, y = ctx.saved_tensors
        if ctx.whiten:
            grad = ctx.whiten.adjust(y, grad)
        of_out = grad @ half(out_weight, x.dtype)
        needed = ctx.needs_input_grad
        if needed[2]:
            ctx.uses.append(Use(value, out, of_out))
        of_value = attention.attend_grad(weights, of_out, ctx.heads, ctx.sight)
        return (
            None,
            of_value @ half(weight, x.dtype),
            None,
            None,
            None,
            _weights_grad(needed[5], of_value, x),
            column_sums(of_value) if needed[6] else None,
            _weights_grad(needed[7], grad, out),
        )


def _nonlin(module: Any, x: Tensor, weights: Tensor, sight: Sight, uses: list[Use]) -> Tensor:
    first, second = module.in_proj, module.out_proj
    return _NonlinAttention.apply(
        module, x, weights, sight, uses, first.weight, first.bias, second.weight
    )


class _NonlinAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, module: Any, x: Tensor, weights: Tensor, sight: Sight, uses: list[Use],
        weight: Tensor, bias: Tensor, out_weight: Tensor,
    ) -> Tensor:  # fmt: skip
        projected = F.linear(x, half(weight, x.dtype), half(bias, x.dtype))
        value = gates.tanh_gate(projected)
        out, gated = attention.attend_gated(weights, value, projected, sight)
        y = F.linear(gated, half(out_weight, x.dtype))
        ctx.sight, ctx.uses = sight, uses
        ctx.balancer = module.gate_balancer if module.gate_balancer.drawn() else None
        ctx.whiten = module.whiten if module.whiten.drawn() else None
        ctx.save_for_backward(
            x, weights, projected, value, out, weight, out_weight, y if ctx.whiten else None
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, projected, value, out, weight, out_weight, y = ctx.saved_tensors
        if ctx.whiten:
            grad = ctx.whiten.adjust(y, grad)
        of_projected = torch.empty_like(projected)
        of_out, gated = gates.outer_gate_grad(
            projected, out, grad @ half(out_weight, x.dtype), of_projected
        )
        needed = ctx.needs_input_grad
        if needed[2]:
            ctx.uses.append(Use(value, out, of_out))
        gates.tanh_gate_grad(
            projected, attention.attend_grad(weights, of_out, 1, ctx.sight), of_projected
        )
        if ctx.balancer:
            channels = value.size(-1)
            ctx.balancer.adjust_in_place(projected[..., :channels], of_projected[..., :channels])
        return (
            None,
            of_projected @ half(weight, x.dtype),
            None,
            None,
            None,
            _weights_grad(needed[5], of_projected, x),
            column_sums(of_projected) if needed[6] else None,
            _weights_grad(needed[7], grad, gated),
        )


# -------------------------------------------------------------------------- between two frame rates


class _Downsample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, bias)
        return stream.downsample(x, bias, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_full: Tensor, of_half: Tensor) -> tuple[Tensor | None, ...]:
        return *stream.downsample_grad(of_full, of_half, *ctx.saved_tensors), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, slow: Tensor, scale: Tensor, factor: int, limits: tuple[float, float]
    ) -> Tensor:
        ctx.save_for_backward(x, slow, scale)
        ctx.settings = (factor, limits)
        return stream.combine(x, slow, scale, factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_all = stream.combine_grad(grad.contiguous(), *ctx.saved_tensors, *ctx.settings)
        return *of_all, None, None


# ----------------------------------------------------------------------------------- maps elsewhere


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A map of (..., I) in the type of autocast; gradients of the parameters are float32."""
    return _Linear.apply(x.to(working_type(x)), weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, half(weight, x.dtype), None if bias is None else half(bias, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        return (
            grad @ half(weight, x.dtype) if ctx.needs_input_grad[0] else None,
            _weights_grad(ctx.needs_input_grad[1], grad, x),
            column_sums(grad) if ctx.needs_input_grad[2] else None,
        )
