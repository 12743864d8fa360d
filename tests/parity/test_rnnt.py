"""Every array of k2's transducer losses, and every combination that k2 refuses or warns about.

The copy in tests/ has the small cases only (edge cases and no boundary).
"""

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from icetransfer.training import rnnt

HERE = Path(__file__).parent / "data"
LOSS_TOLERANCE = 1e-5  # relative, float32
F64_TOLERANCE = 1e-8
# Relative to the largest entry. k2 sums scores in float32, where a score of some hundred nats has
# steps of 3e-5; we sum in float64.
GRAD_TOLERANCE = 1e-4


class Reference:
    """The arrays of one folder, and which of them have been compared."""

    def __init__(self, folder: Path) -> None:
        self.arrays = dict(np.load(folder / "rnnt_loss.npz"))
        self.meta = json.loads((folder / "rnnt_loss.json").read_text())
        inputs = {name for name in self.arrays if name.count(".") == 1}
        self.left = set(self.arrays) - inputs

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])

    def boundary(self, case: str) -> Tensor | None:
        return self[f"{case}.boundary"] if f"{case}.boundary" in self.arrays else None

    def cases(self) -> Iterator[str]:
        for case in self.meta["cases"]:
            if f"{case}.am" in self.arrays:
                for rnnt_type in ("regular", "modified"):
                    yield f"{case}.{rnnt_type}"

    def names(self, prefix: str, pattern: str) -> Iterator[re.Match[str]]:
        for name in sorted(self.arrays):
            if name.startswith(f"{prefix}.") and (
                match := re.fullmatch(pattern, name[len(prefix) + 1 :])
            ):
                yield match

    def compare(self, name: str, ours: Tensor, tolerance: float, *, optional: bool = False) -> None:
        if optional and name not in self.arrays:
            return
        expected = self[name]
        self.left.discard(name)
        assert ours.shape == expected.shape, name
        if expected.dtype == torch.int64:
            assert torch.equal(ours, expected), name
        elif expected.numel() > 0:
            scale = expected.abs().max().clamp(min=1e-30)
            error = ((ours.detach() - expected).abs().max() / scale).item()
            assert error < tolerance, f"{name}: {error:.2e}"


@pytest.fixture(params=["tests", "shared"])
def reference(request: pytest.FixtureRequest) -> Reference:
    in_tests = request.param == "tests"
    return Reference(HERE if in_tests else request.getfixturevalue("golden_dir"))


def smoothed(
    ref: Reference,
    prefix: str,
    lm_scale: float,
    am_scale: float,
    penalty: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, occupations, and the gradients of its sum."""
    case, rnnt_type = prefix.split(".")
    lm = ref[f"{case}.lm"].to(dtype).requires_grad_()
    am = ref[f"{case}.am"].to(dtype).requires_grad_()
    loss, (px_grad, py_grad) = rnnt.rnnt_loss_smoothed(
        lm,
        am,
        ref[f"{case}.symbols"],
        0,
        lm_only_scale=lm_scale,
        am_only_scale=am_scale,
        boundary=ref.boundary(case),
        rnnt_type=rnnt_type,
        delay_penalty=penalty,
        reduction="none",
        return_grad=True,
    )
    loss.sum().backward()
    return loss, px_grad, py_grad, am.grad, lm.grad


def check_smoothed(ref: Reference, prefix: str) -> None:
    pattern = r"(smoothed_lm([\d.]+)_am([\d.]+)_dp([\d.]+))\.(loss|loss_f64)"
    for match in ref.names(prefix, pattern):
        name = f"{prefix}.{match[1]}"
        double = match[5] == "loss_f64"
        loss, *grads = smoothed(
            ref,
            prefix,
            *(float(match[i]) for i in (2, 3, 4)),
            dtype=torch.float64 if double else torch.float32,
        )
        tolerance = F64_TOLERANCE if double else LOSS_TOLERANCE
        ref.compare(f"{name}.{match[5]}", loss, tolerance)
        if not double:
            kinds = ("px_grad", "py_grad", "am_grad", "lm_grad")
            for kind, grad in zip(kinds, grads, strict=True):
                ref.compare(f"{name}.{kind}", grad, GRAD_TOLERANCE, optional=True)


def check_simple(ref: Reference, prefix: str) -> None:
    case, rnnt_type = prefix.split(".")
    for _ in ref.names(prefix, r"simple\.loss"):
        loss = rnnt.rnnt_loss_simple(
            ref[f"{case}.lm"],
            ref[f"{case}.am"],
            ref[f"{case}.symbols"],
            0,
            boundary=ref.boundary(case),
            rnnt_type=rnnt_type,
            reduction="none",
        )
        ref.compare(f"{prefix}.simple.loss", loss, LOSS_TOLERANCE)


def compare_logits_grad(ref: Reference, name: str, grad: Tensor) -> None:
    ref.compare(f"{name}.logits_grad", grad, GRAD_TOLERANCE, optional=True)
    norms = grad.flatten(1).norm(dim=1)
    ref.compare(f"{name}.logits_grad_norm", norms, GRAD_TOLERANCE, optional=True)


def check_joint(ref: Reference, prefix: str) -> None:
    case, rnnt_type = prefix.split(".")
    for match in ref.names(prefix, r"(joint_dp([\d.]+))\.loss"):
        logits = ref[f"{case}.joint_logits"].requires_grad_()
        loss = rnnt.rnnt_loss(
            logits,
            ref[f"{case}.joint_symbols"],
            0,
            boundary=ref.boundary(case),
            rnnt_type=rnnt_type,
            delay_penalty=float(match[2]),
            reduction="none",
        )
        loss.sum().backward()
        ref.compare(f"{prefix}.{match[1]}.loss", loss, LOSS_TOLERANCE)
        compare_logits_grad(ref, f"{prefix}.{match[1]}", logits.grad)
        logits.grad = None


def check_pruned(ref: Reference, prefix: str) -> None:
    case, rnnt_type = prefix.split(".")
    for match in ref.names(prefix, r"ranges(\d+)"):
        name = f"{prefix}.{match[0]}"
        grads = f"{prefix}.smoothed_lm0.25_am0.0_dp0.0"
        # From k2's own occupations: between windows of equal mass the choice hangs on the last
        # bit of the sums, and peaky lattices are full of such ties.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            ranges = rnnt.get_rnnt_prune_ranges(
                ref[f"{grads}.px_grad"],
                ref[f"{grads}.py_grad"],
                ref[f"{case}.boundary"],
                int(match[1]),
            )
        ref.compare(name, ranges, 0.0)
        am, lm = rnnt.do_rnnt_pruning(ref[f"{case}.prune_am"], ref[f"{case}.prune_lm"], ranges)
        ref.compare(f"{name}.am_pruned", am, 1e-12)
        ref.compare(f"{name}.lm_pruned", lm, 1e-12)
        for loss_match in ref.names(name, r"(pruned_dp([\d.]+))\.(loss|loss_f64)"):
            double = loss_match[3] == "loss_f64"
            logits = ref[f"{case}.pruned_logits_r{ranges.shape[2]}"]
            logits = logits.to(torch.float64 if double else torch.float32, copy=True)
            loss = rnnt.rnnt_loss_pruned(
                logits.requires_grad_(),
                ref[f"{case}.symbols"],
                ranges,
                0,
                boundary=ref.boundary(case),
                rnnt_type=rnnt_type,
                delay_penalty=float(loss_match[2]),
                reduction="none",
            )
            loss.sum().backward()
            tolerance = F64_TOLERANCE if double else LOSS_TOLERANCE
            ref.compare(f"{name}.{loss_match[0]}", loss, tolerance)
            if not double:
                compare_logits_grad(ref, f"{name}.{loss_match[1]}", logits.grad)


def test_every_array(reference: Reference) -> None:
    for prefix in reference.cases():
        check_smoothed(reference, prefix)
        check_simple(reference, prefix)
        check_joint(reference, prefix)
        check_pruned(reference, prefix)
    assert not reference.left, f"{len(reference.left)} arrays not compared: {reference.left}"


def test_what_k2_refuses(reference: Reference) -> None:
    assert len(reference.meta["errors"]) == 9
    for refused in reference.meta["errors"]:
        case, rnnt_type, what = refused.split(".", 2)
        boundary = reference[f"{case}.boundary"]
        lm, am = reference[f"{case}.lm"], reference[f"{case}.am"]
        symbols = reference[f"{case}.symbols"]
        if what.startswith("ranges"):
            grads = f"{case}.{rnnt_type}.smoothed_lm0.25_am0.0_dp0.0"
            px_grad, py_grad = reference[f"{grads}.px_grad"], reference[f"{grads}.py_grad"]
            with warnings.catch_warnings(), pytest.raises(ValueError, match="range of 2 or more"):
                warnings.simplefilter("ignore", UserWarning)
                rnnt.get_rnnt_prune_ranges(px_grad, py_grad, boundary, int(what[-1]))
            continue
        with pytest.raises(ValueError, match=r"sequence 0 .* as many frames as symbols"):
            if what.startswith("joint"):
                logits = reference[f"{case}.joint_logits"]
                rnnt.rnnt_loss(logits, symbols, 0, boundary, rnnt_type)
            elif what == "simple":
                rnnt.rnnt_loss_simple(lm, am, symbols, 0, boundary, rnnt_type)
            else:
                rnnt.rnnt_loss_smoothed(lm, am, symbols, 0, 0.25, 0.0, boundary, rnnt_type)


def test_what_k2_warns_about(reference: Reference) -> None:
    assert len(reference.meta["warnings"]) == 9
    for name in reference.meta["warnings"]:
        case, rnnt_type, what = name.split(".")
        grads = f"{case}.{rnnt_type}.smoothed_lm0.25_am0.0_dp0.0"
        with pytest.warns(UserWarning, match="pruning range"):
            ranges = rnnt.get_rnnt_prune_ranges(
                reference[f"{grads}.px_grad"],
                reference[f"{grads}.py_grad"],
                reference[f"{case}.boundary"],
                int(what.removeprefix("ranges")),
            )
        assert torch.equal(ranges, reference[name])
