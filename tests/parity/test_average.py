"""The running average and the averages of checkpoints, as icefall computes them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from icetransfer.model.averaging import (
    average_models,
    average_range,
    start_average,
    update_averaged_model,
)

HERE = Path(__file__).parent / "data"
TOLERANCE = 1e-6  # float32 results; the running average, in float64, agrees to 1e-8


class Reference:
    """The arrays and checkpoints of one folder, and which arrays have been compared."""

    def __init__(self, folder: Path) -> None:
        self.arrays = {k: torch.from_numpy(v) for k, v in np.load(folder / "averaging.npz").items()}
        self.meta = json.loads((folder / "averaging.json").read_text())
        self.checkpoints = {
            epoch: torch.load(folder / f"averaging-epoch-{epoch}.pt", weights_only=False)
            for epoch in (1, 2, 3)
        }
        self.left = set(self.arrays)

    def state(self, prefix: str) -> dict[str, Tensor]:
        names = [name for name in self.arrays if name.startswith(f"{prefix}.")]
        self.left.difference_update(names)
        return {name[len(prefix) + 1 :]: self.arrays[name] for name in names}

    def compare(self, ours: dict[str, Tensor], prefix: str, tolerance: float) -> None:
        expected = self.state(prefix)
        assert ours.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                ours[name].to(value.dtype), value, rtol=tolerance, atol=tolerance
            )


@pytest.fixture(params=["tests", "shared"])
def reference(request: pytest.FixtureRequest) -> Reference:
    in_tests = request.param == "tests"
    return Reference(HERE if in_tests else request.getfixturevalue("golden_dir"))


class Tied(nn.Module):
    """The reference's module: a linear layer, a scalar, and the weight once more."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))
        self.lin = nn.Linear(4, 3)
        self.tied = self.lin.weight


def test_every_array(reference: Reference) -> None:
    model = Tied()
    model.load_state_dict(reference.state("init"))
    averaged = start_average(model)
    period = reference.meta["average_period"]
    updates = 0
    for step in range(1, reference.meta["steps"] + 1):
        model.load_state_dict(reference.state(f"cur_after_step{step}"))
        update_averaged_model(step, period, model, averaged)
        if step % period == 0:
            assert all(value.dtype == torch.float64 for value in averaged.values())
            reference.compare(averaged, f"avg_after_step{step}", 1e-8)
            updates += 1
        if step in reference.meta["epochs_end_at"]:
            saved = reference.checkpoints[reference.meta["epochs_end_at"].index(step) + 1]
            assert saved["batch_idx_train"] == step
            for name, value in saved["model_avg"].items():
                torch.testing.assert_close(averaged[name].float(), value)
    assert updates == 7

    files = reference.checkpoints
    for start, end in ((1, 2), (1, 3), (2, 3)):
        average = average_range(files[start], files[end])
        reference.compare(average, f"averaged_model_epoch{start}_to_{end}", TOLERANCE)
    average = average_models([files[epoch]["model"] for epoch in (1, 2, 3)])
    reference.compare(average, "plain_average_epochs_1_2_3", TOLERANCE)
    assert not reference.left, f"{len(reference.left)} arrays not compared: {reference.left}"
