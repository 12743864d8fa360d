"""Whether a graph of the model is being recorded."""

import torch


def is_exporting() -> bool:
    """True while a graph is being recorded: custom gradients must then give way to plain ops."""
    return torch.jit.is_tracing() or torch.onnx.is_in_onnx_export() or torch.compiler.is_compiling()
