"""What stages cost, and the energy counters of a GPU that pretends."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from icetransfer.stage import cost

NVML = """
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **h) {
  *h = (void *)(long)(i + 1); return i > 2; }
int nvmlDeviceGetHandleByUUID(const char *u, void **h) { *h = (void *)3; return u[0] != 'G'; }
int nvmlDeviceGetTotalEnergyConsumption(void *h, unsigned long long *mj) {
  *mj = 1000ull * (unsigned long)h; return 0; }
"""


def test_every_run_of_a_stage_is_summed(tmp_path: Path) -> None:
    path = tmp_path / "log" / "cost.jsonl"
    with cost.measured(path, "average"):
        pass
    with pytest.raises(SystemExit), cost.measured(path, "train"):
        raise SystemExit(75)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["average", "train"]
    hour = {"stage": "train", "wall_seconds": 3600, "device": "x", "devices": 4, "joules": 3.6e6}
    path.write_text(f"{json.dumps(hour)}\n{json.dumps(hour)}\n" + '{"half a li')
    assert cost.read_costs(path) == {
        "train": {"runs": 2, "wall_hours": 2, "device_hours": 8, "kwh": 2, "device": "x"}
    }
    assert cost.read_costs(tmp_path / "none") == {}


def test_of_several_processes_the_first_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with cost.measured(tmp_path / "cost.jsonl", "train"):
            pass
    (line,) = (tmp_path / "cost.jsonl").read_text().splitlines()
    assert json.loads(line)["devices"] == 2


@pytest.mark.parametrize(
    ("visible", "joules"), [(None, 3), ("1", 2), ("GPU-x,0", 4), ("", None), ("7", None)]
)
def test_energy_of_the_visible_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, joules: float | None
) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to make a library that pretends to be NVIDIA's")
    (tmp_path / "nvml.c").write_text(NVML)
    library = tmp_path / "nvml.so"
    command = [compiler, "-shared", "-fPIC", "-o", str(library), str(tmp_path / "nvml.c")]
    subprocess.run(command, check=True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert cost.EnergyCounters(str(library)).joules() == joules


def test_no_driver() -> None:
    assert cost.EnergyCounters("libno-such.so").joules() is None
