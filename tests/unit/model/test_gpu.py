"""What training is told about GPUs that are not there, too old, or without Triton."""

import re

import pytest
import torch

from icetransfer.model import gpu


@pytest.fixture
def driver(tmp_path, monkeypatch):
    path = tmp_path / "version"
    monkeypatch.setattr(gpu, "DRIVER", path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return path


def test_no_gpu_is_no_shortcoming(driver, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.prepare() is None


def test_a_driver_that_torch_cannot_use(driver, monkeypatch) -> None:
    driver.write_text("NVRM version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "a driver for CUDA 13.0 or newer" in gpu.prepare()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.prepare() is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.version, "cuda", None)  # a wheel for CPUs
    assert gpu.prepare() is None


@pytest.mark.parametrize(
    ("has_triton", "capability", "said"),
    [
        (True, (9, 0), None),
        (False, (9, 0), "pip install triton"),
        (True, (7, 5), "Old Card is older than what the kernels are for .*train.precision=fp16"),
    ],
)
def test_a_gpu(has_triton, capability, said, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "enabled", True)
    monkeypatch.setattr(gpu, "HAS_TRITON", has_triton)
    gpu._is_able.cache_clear()
    found = gpu.prepare()
    gpu._is_able.cache_clear()
    if said is None:
        assert found is None and torch.backends.cudnn.enabled
    else:
        assert re.search(said, found)
        assert not torch.backends.cudnn.enabled
