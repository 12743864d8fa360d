"""Masks and warps of training features (SpecAugment, Park et al. 2019), through lhotse."""

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
