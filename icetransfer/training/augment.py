"""SpecAugment where the batch is: through lhotse on a CPU, by two kernels on a GPU.

Both draw the same numbers and do the same.  lhotse's own form launches a kernel for each mask of
each utterance, and several for each warp.
"""

import torch
from lhotse.dataset.signal_transforms import SpecAugment as Transform
from torch import Tensor

from icetransfer.data.augment import augment as augment_by_lhotse
from icetransfer.data.augment import draw_plan
from icetransfer.model import gpu


def augment(transform: Transform | None, features: Tensor, feature_lens: Tensor) -> Tensor:
    """`data.augment.augment`; the lengths (N,) are on the CPU."""
    if transform is None or not gpu.takes_kernels(features):
        return augment_by_lhotse(transform, features, feature_lens)
    plan = draw_plan(transform, feature_lens, features.size(1), features.size(2))
    if torch.cuda.is_available():
        plan = plan.pin_memory()
    plan = plan.to(features.device, non_blocking=True)
    bands = transform.num_feature_masks
    return gpu.kernels("training.kernels").spec_augment(features, plan, bands)  # type: ignore[no-any-return]
