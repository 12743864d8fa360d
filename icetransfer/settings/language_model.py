"""Language models of text: `language_model` in the config."""

from typing import Literal

from pydantic import Field

from icetransfer.settings.section import Section


class LanguageModel(Section):
    """Language models of text, which decoding may use."""

    text: Literal["none", "transcripts", "text"] = "none"
    """What they are trained on: nothing, the transcripts of the hours, or data.text besides."""
    channels: int = Field(128, ge=8)
    """Of the LSTM's embedding and of each of its layers."""
    layers: int = Field(1, ge=1)
    """Of the LSTM."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Share of the LSTM's values that a step leaves out."""
    batch_tokens: int = Field(2000, ge=1)
    """Tokens of a step, at most, unless one sentence has more."""
    learning_rate: float = Field(0.003, gt=0)
    """Adam's at the start; it is halved when dev perplexity rises."""
    max_epochs: int = Field(40, ge=1)
    """Passes over the text; it ends earlier when dev perplexity does not fall any more."""
