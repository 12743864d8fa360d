"""Shared fixtures: where the reference numbers and the real speech lie, when they are there."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from icetransfer.experiment import log

REPO = Path(__file__).resolve().parent.parent
SHARED = REPO.parent / "shared"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """One thread: the same sums in the same order on every machine with the same kernels."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def log_as_it_was() -> Iterator[None]:
    """A command's main sets the log up for the terminal: the next test must not notice."""
    handlers, propagate = list(log.handlers), log.propagate
    yield
    log.handlers[:], log.propagate = handlers, propagate


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder of golden numbers made with icefall and k2; skips where it is absent."""
    folder = SHARED / "golden" / "tiny"
    if not folder.is_dir():
        pytest.skip(f"golden numbers not found at {folder}: only the copies in tests/ are checked")
    return folder


@pytest.fixture(scope="session")
def speech_dir() -> Path:
    """The folder of real human speech; skips where it is absent."""
    folder = SHARED / "speech"
    if not folder.is_dir():
        pytest.skip(f"real speech not found at {folder}: this test needs it")
    return folder
