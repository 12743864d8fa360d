"""Whether a training listens: what dev losses tell of a collapse, and which setting to change.

A model that ignores its input can still learn how often each token occurs, so its loss falls, for a
while like that of one which learns; its WER is that of silence.  Three numbers tell them apart:

* `deaf_loss`: the entropy of the dev tokens, each taken alone.  A CTC head that hears nothing
  cannot get below it;
* `spread`: the share of the encoder output's power that varies from frame to frame: near 0.9 in a
  model that listens, near 0 in one whose output is the same whatever it hears;
* transducer and CTC loss beside each other: a joiner that has begun to listen gets below the CTC
  loss, because it also knows the tokens before.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from icetransfer.data.loader import Batch

DEAF = 0.9  # of the deaf loss: a CTC head above it has learned next to nothing
SAME = 0.1  # spread under which an encoder's output counts as constant
BEHIND = 1.2  # times the CTC loss: a transducer loss above it is of a joiner that has not begun
BEGUN = 0.2  # of the deaf loss: losses below it are low enough, whatever their order


def token_entropy(batches: Iterable[Batch]) -> float:
    """The nats that the tokens of some batches take when each is coded alone, by its frequency."""
    counts: Counter[int] = Counter()
    for batch in batches:
        for tokens, length in zip(batch.tokens.tolist(), batch.token_lens.tolist(), strict=True):
            counts.update(tokens[:length])
    total = sum(counts.values())
    return -sum(count * math.log(count / total) for count in counts.values())


def moments(out: Tensor, out_lens: Tensor) -> Tensor:
    """Sums over the frames of a batch, from which `spread` is computed.

    Args:
        out: encoder output, (N, T, C).
        out_lens: frames of each utterance, (N,), here or on the CPU.

    Returns:
        (C + 1,) float32: the sum of each channel, then that of all squares.
    """
    lens = out_lens.to(out.device, non_blocking=True)
    frames = torch.arange(out.size(1), device=out.device) < lens.unsqueeze(1)
    heard = out.float() * frames.unsqueeze(2)
    return torch.cat([heard.sum((0, 1)), heard.square().sum().reshape(1)])


def spread(sums: Tensor, frames: float) -> float:
    """The share of the encoder output's power that varies, from the sum of `moments`; in [0, 1]."""
    if not frames or not sums[-1]:
        return 0.0
    power = float(sums[-1]) / frames
    constant = float((sums[:-1].double() / frames).square().sum())
    return max(0.0, 1.0 - constant / power)


def diagnose(numbers: Mapping[str, float]) -> str | None:
    """What is wrong with a model after half of its training or more, and what to change; or None.

    Args:
        numbers: of dev: `spread`, `deaf_loss`, `ctc_loss`, `pruned_loss`; losses in nats a frame.
    """
    deaf, ctc, pruned = numbers["deaf_loss"], numbers["ctc_loss"], numbers["pruned_loss"]
    if numbers["spread"] < SAME:
        return (
            f"the encoder's output hardly depends on its input ({100 * numbers['spread']:.0f} % of "
            f"its power varies; about 90 % in a model that listens): the rate was too high for "
            f"what the base model gives; divide train.lr_scale of encoder and encoder_embed by 3"
        )
    if ctc and ctc > DEAF * deaf:  # 0 in a model without the head
        return (
            f"the CTC head has learned next to nothing (dev loss {ctc:.2f} nats a frame; "
            f"{deaf:.2f} is what a model reaches that hears nothing): the encoder has lost what "
            f"the base model gave, or audio and text do not belong together; divide train.lr_scale "
            f"of encoder and encoder_embed by 3, and listen to some training recordings"
        )
    if ctc and pruned > BEHIND * ctc and pruned > BEGUN * deaf:
        return (
            f"the encoder hears (CTC dev loss {ctc:.2f}) but the joiner has not begun to listen "
            f"(transducer dev loss {pruned:.2f}), so most words will be deleted: raise "
            f"train.max_steps, or train.lr_scale of joiner, simple_am_proj and simple_lm_proj"
        )
    return None
