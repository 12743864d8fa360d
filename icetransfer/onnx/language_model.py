"""The LSTM language model as the ONNX file that sherpa-onnx's online recogniser loads as `lm`.

Inputs x (N, 1) int64, h0 and c0 (D, N, H); outputs log_softmax (N, 1, V), next_h0 and next_c0.
sherpa-onnx begins with `sos_id` of the metadata and zeros.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from icetransfer.model.language_model import BOUNDARY_ID, LanguageModel
from icetransfer.stage import atomic

INPUTS = ("x", "h0", "c0")
OUTPUTS = ("log_softmax", "next_h0", "next_c0")
OPSET = 13


class _Step(nn.Module):
    """The model with its state parted in two."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, h0: Tensor, c0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_probs, (h, c) = self.model(x, (h0, c0))
        return log_probs, h, c


def export_language_model(model: LanguageModel, target: Path) -> None:
    """Writes the file, whole or not at all."""
    h, c = model.initial_state(1)
    given = (torch.full((1, 1), BOUNDARY_ID), h, c)
    axes = {name: {1: "N"} for name in ("h0", "c0", "next_h0", "next_c0")}
    with (
        atomic.atomic_path(target) as temporary,
        warnings.catch_warnings(),
        torch.inference_mode(),
    ):
        warnings.simplefilter("ignore")  # of the exporter's age, and of an LSTM's batch size
        torch.onnx.export(
            _Step(model).eval(),
            given,
            str(temporary),
            input_names=list(INPUTS),
            output_names=list(OUTPUTS),
            dynamic_axes=axes | {"x": {0: "N"}, "log_softmax": {0: "N"}},
            opset_version=OPSET,
            dynamo=False,
        )
        proto = onnx.load(str(temporary))
        facts = {
            "model_type": "rnnlm",
            "version": "1",
            "num_layers": str(model.sizes["layers"]),
            "hidden_size": str(model.sizes["channels"]),
            "vocab_size": str(model.sizes["vocab_size"]),
            "sos_id": str(BOUNDARY_ID),
        }
        onnx.helper.set_model_props(proto, facts)
        onnx.save(proto, str(temporary))
