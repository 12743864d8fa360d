"""The joiner: adds encoder and decoder in a common space and scores the vocabulary.

Shapes: `(..., C)` any leading dimensions (in training N, T4 and the pruned range), C encoder
channels, D decoder channels, J joiner channels, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from icetransfer.model.linear import Linear


class Joiner(nn.Module):
    """output_linear(tanh(encoder_proj(encoder) + decoder_proj(decoder))).

    Args:
        encoder_dim: C.
        decoder_dim: D.
        joiner_dim: J.
        vocab_size: V.
    """

    def __init__(
        self, encoder_dim: int, decoder_dim: int, joiner_dim: int, vocab_size: int
    ) -> None:
        super().__init__()
        self.encoder_proj = Linear(encoder_dim, joiner_dim)
        self.decoder_proj = Linear(decoder_dim, joiner_dim)
        self.output_linear = Linear(joiner_dim, vocab_size)

    def forward(
        self, encoder_out: Tensor, decoder_out: Tensor, project_input: bool = True
    ) -> Tensor:
        """Logits (..., V) of broadcastable encoder (..., C) and decoder (..., D) outputs.

        With project_input=False both come projected already, as (..., J).
        """
        if project_input:
            encoder_out = self.encoder_proj(encoder_out)
            decoder_out = self.decoder_proj(decoder_out)
        return self.output_linear(torch.tanh(encoder_out + decoder_out))
