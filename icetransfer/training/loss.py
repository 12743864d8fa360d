"""The training losses of a transducer model, and the choice of what computes them.

k2 is used when it can be imported, else `icetransfer.training.rnnt`; both give the same numbers.
This is the only file that may import k2.

Shapes: N batch, T encoder frames (40 ms), C encoder channels, S tokens of the longest transcript,
D decoder channels, J joiner channels, R pruning range, V vocabulary.
"""

import functools
import importlib
import importlib.util
import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from icetransfer.model.transducer import TransducerModel
from icetransfer.training import rnnt

logger = logging.getLogger(__name__)

Backend = Literal["auto", "k2", "torch"]

BLANK = 0


@dataclass(frozen=True)
class TransducerLosses:
    """Losses summed over the utterances of a batch, in nats, each a scalar tensor.

    Attributes:
        simple: of the additive joiner that finds the pruning bounds.
        pruned: of the joiner itself, inside the bounds.
        ctc: of the CTC head; None for a model without one.
    """

    simple: Tensor
    pruned: Tensor
    ctc: Tensor | None

    def total(self, simple_scale: float, pruned_scale: float, ctc_scale: float = 0.0) -> Tensor:
        """The weighted sum to minimise (the CTC term only where there is one)."""
        total = simple_scale * self.simple + pruned_scale * self.pruned
        return total if self.ctc is None else total + ctc_scale * self.ctc


def loss_scales(batch: int, warm_step: int, simple_loss_scale: float) -> tuple[float, float]:
    """Weights of the simple and the pruned loss in the batch of this number.

    As icefall's recipes do: while the simple joiner's bounds are still bad the pruned loss counts
    little. Over `warm_step` batches the weights go linearly from (1, 0.1) to
    (`simple_loss_scale`, 1).
    """
    done = min(batch / warm_step, 1.0) if warm_step > 0 else 1.0
    return 1.0 + done * (simple_loss_scale - 1.0), 0.1 + done * 0.9


def loss_backend(backend: Backend = "auto") -> str:
    """The name of what computes the loss when `backend` is asked for: "k2" or "torch".

    Raises:
        ValueError: an unknown backend, or k2 asked for and not there.
    """
    return "torch" if _functions(backend) is rnnt else "k2"


def transducer_loss(
    model: TransducerModel,
    encoder_out: Tensor,
    encoder_out_lens: Tensor,
    tokens: Tensor,
    token_lens: Tensor,
    *,
    prune_range: int = 5,
    lm_scale: float = 0.25,
    am_scale: float = 0.0,
    rnnt_type: rnnt.RnntType = "regular",
    delay_penalty: float = 0.0,
    backend: Backend = "auto",
) -> TransducerLosses:
    """Computes the losses of a batch (arXiv:2206.13236).

    Args:
        model: its decoder, joiner, simple projections and, where it has one, CTC head are used.
        encoder_out: (N, T, C), from `model.encode`.
        encoder_out_lens: (N,) int64 frames of each, at least 1.
        tokens: (N, S) int64 transcripts, padded with 0.
        token_lens: (N,) int64 tokens of each; may be 0, or more than the frames.  Where both
            lengths lie on the CPU, nothing waits for a GPU.
        prune_range: R, symbols per frame that the joiner looks at; raised with a warning for a
            batch that needs more.
        lm_scale: weight of the lm-only prediction in the simple loss.
        am_scale: weight of the am-only prediction in the simple loss.
        rnnt_type: "regular", or "modified" for at most one symbol per frame.
        delay_penalty: of both transducer losses, see `rnnt.rnnt_loss_smoothed`.
        backend: "auto", "k2" or "torch".

    Returns:
        The losses, summed over the batch.

    Raises:
        ValueError: lengths that do not fit, "modified" with more tokens than frames, or an
            unavailable backend.
    """
    functions = _functions(backend)
    if tokens.shape[1] == 0:  # the pruned regular lattice needs room for one symbol
        tokens = torch.nn.functional.pad(tokens, (0, 1))
    zeros = torch.zeros_like(token_lens)
    boundary = torch.stack((zeros, zeros, token_lens, encoder_out_lens), dim=1)
    if functions is not rnnt:
        boundary = boundary.to(tokens.device)
    decoder_out = model.decoder(torch.nn.functional.pad(tokens, (1, 0), value=BLANK))  # (N, S+1, D)
    lm, am = model.simple_lm_proj(decoder_out), model.simple_am_proj(encoder_out)

    # Sums over hundreds of frames: always in full precision.
    with torch.autocast(encoder_out.device.type, enabled=False):
        simple, (px_grad, py_grad) = functions.rnnt_loss_smoothed(
            lm=rnnt.full_precision(lm),
            am=rnnt.full_precision(am),
            symbols=tokens,
            termination_symbol=BLANK,
            lm_only_scale=lm_scale,
            am_only_scale=am_scale,
            boundary=boundary,
            rnnt_type=rnnt_type,
            delay_penalty=delay_penalty,
            reduction="sum",
            return_grad=True,
        )
        ranges = functions.get_rnnt_prune_ranges(
            px_grad=px_grad,
            py_grad=py_grad,
            boundary=boundary,
            s_range=min(prune_range, tokens.shape[1] + 1),
        )
    am_pruned, lm_pruned = functions.do_rnnt_pruning(
        am=model.joiner.encoder_proj(encoder_out),
        lm=model.joiner.decoder_proj(decoder_out),
        ranges=ranges,
    )
    logits = model.joiner(am_pruned, lm_pruned, project_input=False)  # (N, T, R, V)
    with torch.autocast(encoder_out.device.type, enabled=False):
        pruned = functions.rnnt_loss_pruned(
            logits=rnnt.full_precision(logits),
            symbols=tokens,
            ranges=ranges,
            termination_symbol=BLANK,
            boundary=boundary,
            rnnt_type=rnnt_type,
            delay_penalty=delay_penalty,
            reduction="sum",
        )
        ctc = _ctc_loss(model, encoder_out, encoder_out_lens, tokens, token_lens)
    return TransducerLosses(simple=simple, pruned=pruned, ctc=ctc)


def _ctc_loss(
    model: TransducerModel,
    encoder_out: Tensor,
    encoder_out_lens: Tensor,
    tokens: Tensor,
    token_lens: Tensor,
) -> Tensor | None:
    """Summed CTC loss; an utterance with too few frames for its tokens counts as zero."""
    if model.ctc_output is None:
        return None
    log_probs: Tensor = model.ctc_output(rnnt.full_precision(encoder_out))
    return torch.nn.functional.ctc_loss(
        log_probs.transpose(0, 1),
        tokens,
        encoder_out_lens,
        token_lens,
        blank=BLANK,
        reduction="sum",
        zero_infinity=True,
    )


@functools.cache
def _functions(backend: Backend) -> Any:
    """The module, k2 or `icetransfer.training.rnnt`, that has the loss functions.

    Raises:
        ValueError: see `loss_backend`.
    """
    if backend == "torch":
        return rnnt
    if backend not in ("auto", "k2"):
        raise ValueError(f"loss backend is {backend!r}, expected auto, k2 or torch")
    try:
        return importlib.import_module("k2")
    except (ImportError, OSError) as error:  # OSError: a wheel built for another torch
        if backend == "k2":
            raise ValueError(
                f"loss backend k2 cannot be imported ({error}): install the wheel that matches "
                f"torch {torch.__version__} (tools/install_k2.sh), or use the backend torch"
            ) from error
        if importlib.util.find_spec("k2") is not None:
            logger.warning("k2 is installed but cannot be imported (%s): using torch", error)
        return rnnt
