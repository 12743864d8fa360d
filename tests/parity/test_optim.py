"""ScaledAdam's trajectories and Eden's tables, as icefall gives them."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from icetransfer.training.optim import Eden, ScaledAdam

HERE = Path(__file__).parent / "data"
TOLERANCE = 1e-5  # relative to the largest entry, after up to 60 steps


class Reference:
    """The arrays of one folder, and which of them have been used."""

    def __init__(self, folder: Path) -> None:
        self.arrays = dict(np.load(folder / "optim.npz"))
        self.meta = json.loads((folder / "optim.json").read_text())
        self.left = set(self.arrays)

    def __getitem__(self, name: str) -> np.ndarray:
        self.left.discard(name)
        return self.arrays[name]


@pytest.fixture(params=["tests", "shared"])
def reference(request: pytest.FixtureRequest) -> Reference:
    in_tests = request.param == "tests"
    return Reference(HERE if in_tests else request.getfixturevalue("golden_dir"))


class Run:
    """One case: its parameters, optimiser and schedule."""

    def __init__(self, ref: Reference, name: str) -> None:
        self.ref, self.name = ref, name
        self.case: dict[str, Any] = ref.meta["cases"][name]
        self.params = {
            p: torch.nn.Parameter(torch.tensor(ref[f"{name}.init.{p}"]))
            for p in self.case["shapes"]
        }
        self.optimizer = ScaledAdam(
            list(self.params.values()),
            lr=0.045,
            clipping_scale=self.case["clipping_scale"],
            clipping_update_period=self.case["param_group"]["clipping_update_period"],
        )
        self.eden = None
        if settings := copy.copy(self.case["eden"]):
            assert settings.pop("base_lr") == 0.045
            self.eden = Eden(self.optimizer, **settings)

    def step(self, k: int) -> None:
        if self.eden is not None:
            epoch = (self.case["epoch_changes"] or {}).get(str(k))
            if epoch is not None:
                self.eden.step_epoch(epoch)
            self.eden.step_batch(k)
        for p, param in self.params.items():
            param.grad = torch.tensor(self.ref[f"{self.name}.grads.{p}"][k - 1])
        self.optimizer.step()

    def resumed(self) -> "Run":
        """A new run that goes on from what this one would save."""
        other = Run(self.ref, self.name)
        for p, param in self.params.items():
            other.params[p].data.copy_(param.data)
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        if other.eden is not None:
            other.eden.load_state_dict(self.eden.state_dict())
        return other


def check_state(run: Run) -> None:
    """Compare the final settings and the layout of the state."""
    group = run.optimizer.param_groups[0]
    for key, value in run.case["param_group"].items():
        ours = list(group[key]) if key == "betas" else group[key]
        assert ours == (pytest.approx(value, rel=1e-12) if key == "lr" else value), key
    state = run.optimizer.state_dict()["state"]
    layout = run.case["optimizer_state_layout"]
    assert {str(index) for index in state} == set(layout)
    for index, expected in layout.items():
        ours = state[int(index)]
        assert set(ours) == set(expected)
        for key, value in expected.items():
            if isinstance(value, list):
                assert list(ours[key].shape) == value, (index, key)
            else:
                assert ours[key] == pytest.approx(value, rel=1e-5), (index, key)


@pytest.mark.parametrize("resume_after", [None, 22])
def test_trajectories(reference: Reference, resume_after: int | None) -> None:
    for name in reference.meta["cases"]:
        run = Run(reference, name)
        for k in range(1, reference.meta["steps"] + 1):
            run.step(k)
            rate = reference[f"{name}.lr"][k - 1]
            assert run.optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-9)
            if k in reference.meta["snapshots"]:
                for p, param in run.params.items():
                    expected = reference[f"{name}.after{k}.{p}"]
                    error = np.abs(param.detach().numpy() - expected).max()
                    assert error < TOLERANCE * np.abs(expected).max(), (name, k, p)
            if k == resume_after:
                run = run.resumed()
        check_state(run)
    not_eden = {name for name in reference.left if not name.startswith("eden_table.")}
    assert not not_eden, f"{len(not_eden)} arrays not used: {not_eden}"


@pytest.mark.parametrize(("table", "warmup_start"), [("default", 0.5), ("recipe", 0.1)])
def test_eden_tables(reference: Reference, table: str, warmup_start: float) -> None:
    optimizer = ScaledAdam([torch.nn.Parameter(torch.zeros(2))], lr=0.045)
    eden = Eden(optimizer, lr_batches=7500, lr_epochs=3.5, warmup_start=warmup_start)
    for epoch, batch, rate in reference[f"eden_table.{table}"]:
        eden.step_epoch(int(epoch))
        eden.step_batch(int(batch))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-12)
    assert len([name for name in reference.arrays if name.startswith("eden_table.")]) == 2
