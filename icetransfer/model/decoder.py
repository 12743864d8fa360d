"""The stateless decoder: an embedding and a grouped convolution over the last few tokens.

Shapes: N batch, U tokens of a history, D decoder channels, V vocabulary.

Source: Ghodsi et al., RNN-Transducer with Stateless Prediction Network (2020).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icetransfer.model.scaling import Balancer

CHANNELS_PER_GROUP = 4


class Decoder(nn.Module):
    """Predicts from the last `context_size` tokens alone.

    Args:
        vocab_size: V.
        decoder_dim: D.
        context_size: tokens of history; with 1 there is no convolution.
    """

    def __init__(self, vocab_size: int, decoder_dim: int, context_size: int) -> None:
        super().__init__()
        self.context_size = context_size
        self.embedding = nn.Embedding(vocab_size, decoder_dim)
        self.embedding_balancer = Balancer(0.0, 1.0, 0.5, 1.0)
        if context_size > 1:
            groups = decoder_dim // CHANNELS_PER_GROUP
            self.conv = nn.Conv1d(decoder_dim, decoder_dim, context_size, groups=groups, bias=False)
        self.out_balancer = Balancer(0.0, 1.0, 0.5, 1.0)

    def forward(self, tokens: Tensor) -> Tensor:
        """Outputs along whole histories (N, U) that start with blank: (N, U, D).

        What lies before the first token counts as a zero embedding.
        """
        x = self._embed(tokens)
        return self._mix(F.pad(x, (0, 0, self.context_size - 1, 0)))

    def predict(self, context: Tensor) -> Tensor:
        """The output (N, 1, D) after the last tokens (N, context_size); -1 is a zero embedding."""
        return self._mix(self._embed(context))

    def _embed(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens.clamp(min=0)) * (tokens >= 0).unsqueeze(-1)
        return self.embedding_balancer(x)

    def _mix(self, x: Tensor) -> Tensor:
        if self.context_size > 1 and x.is_cuda:
            x = grouped_conv(x, self.conv)
        elif self.context_size > 1:
            x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.out_balancer(torch.relu(x))


def grouped_conv(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """Runs `conv` along the frames of (N, U, D) as one product of matrices a group.

    On a GPU, cuDNN runs a kernel for each group, of which there are hundreds.
    """
    width, groups = conv.kernel_size[0], conv.groups
    windows = x.unfold(1, width, 1).unflatten(2, (groups, -1))  # (N, U, groups, channels, width)
    rows = windows.permute(2, 0, 1, 3, 4).flatten(3).flatten(1, 2)
    weight = conv.weight.unflatten(0, (groups, -1)).flatten(2)  # (groups, out, channels * width)
    out = torch.matmul(rows, weight.transpose(1, 2))  # (groups, N * U, out)
    return out.unflatten(1, windows.shape[:2]).permute(1, 2, 0, 3).flatten(2)
