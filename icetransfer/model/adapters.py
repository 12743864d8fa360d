"""Low-rank adapters in the attention and feed-forward layers (LoRA, arXiv:2106.09685).

A weight W (out, in) becomes W' + U D, with U (out, rank) and D (rank, in) trained and W' fixed.
U and D both start random, and W' = W - U D so that nothing changes at first: ScaledAdam's steps are
relative to a tensor's size, and from a U of zeros it would not get away.

Checkpoints hold the merged weights under their own names, so that they are read, averaged and
exported like any others; what the merge loses is kept beside them, for a run to go on.
"""

import re

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from icetransfer.model.parts import is_in, require_matches

ADAPTED = re.compile(
    r"\.(self_attn_weights|self_attn[12]|nonlin_attention|feed_forward[123])\.(in|out)_proj$"
)
INFIX = ".parametrizations."
RELATIVE_SIZE = 0.1  # rms of U D at the start, relative to W's


class LowRank(nn.Module):
    """Adds U D to a weight.

    Args:
        weight: (out, in), whose size the adapter is made for.
        rank: columns of U.
        generator: draws the start.
    """

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        rms = float(weight.square().mean().sqrt())
        self.up = nn.Parameter(torch.randn(out_features, rank, generator=generator))
        self.down = nn.Parameter(torch.randn(rank, in_features, generator=generator))
        with torch.no_grad():
            self.down.mul_(RELATIVE_SIZE * rms * rank**-0.5)

    def forward(self, weight: Tensor) -> Tensor:
        """W' (out, in) to W' + U D."""
        return weight + self.up @ self.down


def attach(model: nn.Module, rank: int, parts: tuple[str, ...], seed: int) -> None:
    """Gives every attention and feed-forward projection in the parts an adapter.

    A part may have none, as the front end: it is then only left as it is.

    Args:
        model: on the CPU; changed in place, its outputs are the same but for rounding.
        rank: of the adapters.
        parts: see `parts`.
        seed: of their start.

    Raises:
        ValueError: a part that matches no parameter, or no such layer in any of them.
    """
    key = "transfer.adapters.parts"
    require_matches(parts, [name for name, _ in model.named_parameters()], key)
    layers = {
        name: module
        for name, module in model.named_modules()
        if ADAPTED.search(name)
        and isinstance(module, nn.Linear)
        and any(is_in(name, part) for part in parts)
    }
    if not layers:
        raise ValueError(f"{key}={list(parts)}: no attention or feed-forward layer lies in these")
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        adapter = LowRank(layer.weight.detach(), rank, generator)
        with torch.no_grad():
            layer.weight.sub_(adapter.up @ adapter.down)
        parametrize.register_parametrization(layer, "weight", adapter)


def is_fixed(name: str, parts: tuple[str, ...]) -> bool:
    """Whether a parameter of a model with adapters in the parts is one that they leave alone."""
    is_adapter = INFIX in name and not name.endswith(".original")
    return not is_adapter and any(is_in(name, part) for part in parts)


@torch.no_grad()
def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as it is without adapters: theirs are merged into the weights."""
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        layer, infix, rest = name.partition(INFIX)
        if not infix:
            state[name] = value
        elif rest.endswith(".original"):
            weight: Tensor = getattr(model.get_submodule(layer), "weight")  # noqa: B009 - for mypy
            state[f"{layer}.weight"] = weight.detach()
    return state


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """What `plain_state` does not tell: the adapters, and the weights below them."""
    return {name: value for name, value in model.state_dict().items() if INFIX in name}
