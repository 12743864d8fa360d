"""The convolutional front end: 100 Hz features to 50 Hz embeddings.

Shapes: N batch, T feature frames (10 ms), T2 = (T-7)//2 (20 ms), F = 80 mel bins, F' = 19 after
the convolutions, C channels, D output channels.

Images are kept channels-last in memory: torch's depthwise and strided convolutions are then several
times faster on a CPU, above all backwards, and pointwise ones are plain matrix products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icetransfer.model import gpu
from icetransfer.model.cpu import is_plain_float32, wide_swoosh
from icetransfer.model.exporting import is_exporting
from icetransfer.model.linear import Linear, linear
from icetransfer.model.scaling import (
    Balancer,
    BiasNorm,
    ScheduledFloat,
    SwooshL,
    SwooshR,
    Whiten,
)

FEATURE_DIM = 80
# A chunk of c embeddings needs 2c + WINDOW_EXTRA features: 7 lost to the first convolutions and 3
# embeddings (6 features) of look-ahead by the ConvNeXt.
WINDOW_EXTRA = 13
CONVNEXT_KERNEL = 7
CONVNEXT_SIDE = CONVNEXT_KERNEL // 2


def subsampled_length(length: Tensor | int) -> Tensor | int:
    """Embeddings (20 ms) that the front end makes of `length` features (10 ms)."""
    return (length - 7) // 2


class ConvNeXt(nn.Module):
    """One ConvNeXt block over time and frequency: depthwise 7x7, widen by three, SwooshL, residual.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = 3 * channels
        self.depthwise_conv = nn.Conv2d(
            channels, channels, CONVNEXT_KERNEL, groups=channels, padding=CONVNEXT_SIDE
        )
        self.pointwise_conv1 = nn.Conv2d(channels, hidden, 1)
        self.hidden_balancer = Balancer(0.3, 1.0, 0.75, 5.0, channel_dim=1)
        self.activation = SwooshL()
        self.pointwise_conv2 = nn.Conv2d(hidden, channels, 1)
        self.out_balancer = Balancer(0.4, 0.6, 1.0, 6.0, channel_dim=1)
        with torch.no_grad():
            self.pointwise_conv2.weight.mul_(0.01)
            self.pointwise_conv2.bias.mul_(0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, T2, F') to the same shape, with zeros beyond both ends."""
        return self.out_balancer(x + self._mix(x, padding=(CONVNEXT_SIDE, CONVNEXT_SIDE)))

    def streaming_forward(self, x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Process one chunk.

        Args:
            x: (N, C, T2 + 3, F'), the chunk and 3 embeddings of look-ahead.
            cache: (N, C, 3, F'), the embeddings before the chunk.

        Returns:
            (N, C, T2, F') and the next cache.
        """
        chunk = x.size(2) - CONVNEXT_SIDE
        padded = torch.cat([cache, x], dim=2)
        y = self._mix(padded, padding=(0, CONVNEXT_SIDE))
        return x[:, :, :chunk] + y, padded[:, :, chunk : chunk + CONVNEXT_SIDE]

    def _mix(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        first, second = self.pointwise_conv1, self.pointwise_conv2
        depthwise = self.depthwise_conv
        # The depthwise bias joins that of the next layer: its gradient alone would cost as much as
        # all the rest of the depthwise convolution.
        bias = first.bias + first.weight.flatten(1) @ depthwise.bias
        if gpu.takes_kernels(x) and padding == (CONVNEXT_SIDE, CONVNEXT_SIDE):
            x = gpu.kernels("model.kernels.front_end").depthwise_conv2d(x, depthwise.weight)
        else:
            x = F.conv2d(x, depthwise.weight, padding=padding, groups=depthwise.groups)
        if is_plain_float32(x):
            balancer = self.hidden_balancer if self.hidden_balancer.acts_on(x) else None
            rows = x.permute(0, 2, 3, 1)
            return wide_swoosh(rows, first, bias, balancer, second).permute(0, 3, 1, 2)
        x = self.hidden_balancer(pointwise(x, first.weight, bias))
        return pointwise(self.activation(x), second.weight, second.bias)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 1x1 convolution of (N, C, T, F) with weight (D, C, 1, 1)."""
    if is_exporting():
        return F.conv2d(x, weight, bias)
    return linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


class Conv2dSubsampling(nn.Module):
    """Three 3x3 convolutions (time / 2, frequency / 4), ConvNeXt, a linear map and BiasNorm.

    The front end does not know lengths: the last embeddings of a short utterance see its padding.

    Args:
        channels: of the three convolutions.
        out_channels: D.
    """

    def __init__(self, channels: tuple[int, ...], out_channels: int) -> None:
        super().__init__()
        first, second, third = channels
        self.conv = nn.Sequential(
            nn.Conv2d(1, first, 3, padding=(0, 1)),
            nn.Identity(),  # keeps the convolutions at the indices 0, 4, 7 of the checkpoints
            Balancer(max_abs=1.0, channel_dim=1),
            SwooshR(),
            nn.Conv2d(first, second, 3, stride=2),
            Balancer(max_abs=4.0, channel_dim=1),
            SwooshR(),
            nn.Conv2d(second, third, 3, stride=(1, 2)),
            Balancer(max_abs=4.0, channel_dim=1),
            SwooshR(),
        )
        self.convnext = ConvNeXt(third)
        self.out_freq = (FEATURE_DIM - 1) // 2 // 2
        self.out = Linear(third * self.out_freq, out_channels)
        self.out_whiten = Whiten(limit=4.0)
        self.out_norm = BiasNorm(out_channels)
        self.dropout = ScheduledFloat((0.0, 0.3), (20000.0, 0.1))

    def forward(self, features: Tensor) -> Tensor:
        """Maps features (N, T, F) to embeddings (N, T2, D)."""
        x = self.convnext(self._convolve(features))
        return F.dropout(self._project(x), self.dropout.value, self.training)

    def streaming_forward(self, features: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Embeds one window of features.

        Args:
            features: (N, 2c + 13, F).
            cache: (N, C, 3, F'), see `ConvNeXt.streaming_forward`.

        Returns:
            Embeddings (N, c, D) and the next cache.
        """
        x, cache = self.convnext.streaming_forward(self._convolve(features), cache)
        return self._project(x), cache

    def initial_cache(self, batch_size: int) -> Tensor:
        """The cache before the first frame: zeros (N, C, 3, F')."""
        channels = self.convnext.depthwise_conv.in_channels
        weight = self.out.weight
        return weight.new_zeros(batch_size, channels, CONVNEXT_SIDE, self.out_freq)

    def _convolve(self, features: Tensor) -> Tensor:
        image = features.unsqueeze(1)
        if not is_exporting():
            image = image.to(memory_format=torch.channels_last)
        return self.conv(image)

    def _project(self, x: Tensor) -> Tensor:
        """Maps (N, C, T2, F') to (N, T2, D)."""
        if is_exporting():
            x = self.out(x.transpose(1, 2).flatten(2))
        else:
            # The checkpoint's weight runs over (C, F'), the image in memory over (F', C).
            weight = self.out.weight.unflatten(1, (-1, self.out_freq)).transpose(1, 2).flatten(1)
            x = linear(x.permute(0, 2, 3, 1).flatten(2), weight, self.out.bias)
        return self.out_norm(self.out_whiten(x))
