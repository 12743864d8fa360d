"""A small language model in the tokens of an experiment: embedding, LSTM, one projection.

Shapes: N sentences, L tokens, V vocabulary, H channels, D layers.  A sentence begins after
`<sos/eos>` and ends with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

BOUNDARY_ID = 1  # <sos/eos>

State = tuple[Tensor, Tensor]


class LanguageModel(nn.Module):
    """Gives the probability of each next token.

    Args:
        vocab_size: V.
        channels: H.
        layers: D.
        dropout: in training, before and after the LSTM and between its layers.
    """

    def __init__(self, vocab_size: int, channels: int, layers: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.sizes = {"vocab_size": vocab_size, "channels": channels, "layers": layers}
        self.embedding = nn.Embedding(vocab_size, channels)
        between = dropout if layers > 1 else 0.0
        self.lstm = nn.LSTM(channels, channels, layers, batch_first=True, dropout=between)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(channels, vocab_size)

    def initial_state(self, batch_size: int) -> State:
        """The state (D, N, H) twice, before the first token."""
        size = (self.sizes["layers"], batch_size, self.sizes["channels"])
        return torch.zeros(size), torch.zeros(size)

    def forward(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Reads tokens.

        Args:
            tokens: (N, L) int64.
            state: (D, N, H) twice.

        Returns:
            (N, L, V) log-probabilities of the token after each, and the next state.
        """
        hidden, state = self.lstm(self.dropout(self.embedding(tokens)), state)
        return self.output(self.dropout(hidden)).log_softmax(dim=2), state

    def negative_log_likelihood(self, sentences: Tensor, lens: Tensor) -> Tensor:
        """The sum over sentences, their ends included.

        Args:
            sentences: (N, L) int64, padded with anything that is a token.
            lens: (N,) tokens that count.
        """
        begin = torch.full((len(sentences), 1), BOUNDARY_ID)
        given = torch.cat([begin, sentences], dim=1)
        wanted = torch.cat([sentences, begin], dim=1)
        wanted = wanted.scatter(1, lens.unsqueeze(1), BOUNDARY_ID)
        log_probs, _ = self(given, self.initial_state(len(sentences)))
        picked = log_probs.gather(2, wanted.unsqueeze(2)).squeeze(2)
        counts = torch.arange(given.size(1)) <= lens.unsqueeze(1)
        return -picked.masked_fill(~counts, 0.0).sum()


def build_language_model(content: dict[str, Any]) -> LanguageModel:
    """The model of a checkpoint that training has written, in evaluation mode."""
    model = LanguageModel(**content["sizes"])
    model.load_state_dict(content["model"])
    return model.eval()


def load_language_model(path: Path, vocab_size: int) -> LanguageModel:
    """Reads what training has written.

    Raises:
        ValueError: the file is missing, or the model is of other tokens.
    """
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: run stage 8, which trains it where language_model.text is set"
        )
    model = build_language_model(torch.load(path, weights_only=True))
    if model.sizes["vocab_size"] != vocab_size:
        raise ValueError(
            f"{path} is of {model.sizes['vocab_size']} tokens and the experiment has "
            f"{vocab_size}: run stage 8 again, which trains it again"
        )
    return model
