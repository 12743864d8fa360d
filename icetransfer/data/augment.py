"""SpecAugment (Park et al. 2019): masks and warps of a batch of training features, by lhotse."""

import math
import random

import numpy as np
import torch
from lhotse.dataset.signal_transforms import SpecAugment as Transform
from torch import Tensor

from icetransfer.config import SpecAugment


def make_transform(section: SpecAugment) -> Transform | None:
    """The transform of lhotse with the config's settings, None when it is off."""
    if not section.enabled:
        return None
    return Transform(**section.model_dump(exclude={"enabled"}))


def augment(transform: Transform | None, features: Tensor, feature_lens: Tensor) -> Tensor:
    """Augments a batch with numbers drawn from the global generators (random, numpy, torch).

    Args:
        transform: from `make_transform`; None leaves the features as they are.
        features: (N, T, 80).
        feature_lens: (N,), on the CPU; time is warped within them.

    Returns:
        (N, T, 80), a new tensor.
    """
    if transform is None:
        return features
    rows = torch.arange(len(feature_lens))
    segments = torch.stack([rows, torch.zeros_like(rows), feature_lens], dim=1)
    augmented: Tensor = transform(features, supervision_segments=segments.int())
    return augmented


def draw_plan(transform: Transform, feature_lens: Tensor, frames: int, bins: int) -> Tensor:
    """What `augment` would do to a batch, drawn as lhotse draws it, for those who do it otherwise.

    Args:
        transform: from `make_transform`.
        feature_lens: (N,), on the CPU.
        frames: T, of the batch with its padding.
        bins: F.

    Returns:
        (N, 3 + 2 * (bands + stretches)) int32: frames within which time is warped, the frame in
        their middle and where that goes (twice 0 for no warp); then first and last (exclusive)
        of each masked band of bins and of each masked stretch of frames.
    """
    bands = (transform.num_feature_masks, transform.features_mask_size)
    stretches = _stretches(transform, frames)
    warps = [_draw_warp(transform, length) for length in feature_lens.tolist()]
    drawn = [_draw_masks(transform, bands, stretches) for _ in warps]
    columns = [torch.tensor(warps)]
    for axis, whole in enumerate((bins, frames)):
        sizes = torch.cat([row[2 * axis] for row in drawn])
        firsts = (torch.cat([row[2 * axis + 1] for row in drawn]) * (whole - sizes)).long()
        columns.append(torch.stack([firsts, firsts + sizes], dim=2).flatten(1))
    return torch.cat(columns, dim=1).int()


def _draw_warp(transform: Transform, length: int) -> tuple[int, int, int]:
    factor = transform.time_warp_factor
    if random.random() > transform.p or not factor or factor < 1 or length <= 2 * factor + 1:
        return length, 0, 0
    centre = np.random.randint(factor + 1, length - factor)
    return length, centre, np.random.randint(centre - factor, centre + factor + 1)


def _stretches(transform: Transform, frames: int) -> tuple[int, int]:
    """How many stretches of a batch of so many frames are masked, and how long they can be."""
    most = transform.max_frames_mask_fraction * frames
    number = min(transform.num_frame_masks, math.ceil(most / transform.frames_mask_size))
    return number, int(min(transform.frames_mask_size, most // max(number, 1)))


def _draw_masks(
    transform: Transform, bands: tuple[int, int], stretches: tuple[int, int]
) -> tuple[Tensor, ...]:
    """Sizes of the bands (1, number), and what decides where they begin; the same of stretches."""
    if random.random() > transform.p:  # masks of no size
        return tuple(torch.zeros(1, number) for number, _ in (bands, bands, stretches, stretches))
    return tuple(
        drawn
        for number, most in (bands, stretches)
        for drawn in (torch.randint(0, most, (1, number)), torch.rand(1, number))
    )
