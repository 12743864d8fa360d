"""A server in this process, with bundles of a model that says "een" in every frame."""

import asyncio
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile

from icetransfer.serving.columns import Column, find_columns
from icetransfer.serving.session import Limits
from icetransfer.serving.site import Site
from icetransfer.streaming.exported import Exported

Serve = Callable[..., AbstractContextManager[Site]]


@pytest.fixture(scope="session")
def bundle(nano_bundle: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a test recording of two seconds."""
    folder = tmp_path_factory.mktemp("serving") / "nl-ml" / "bundle"
    tier = shutil.copytree(nano_bundle.dir, folder / nano_bundle.dir.name)
    samples = 0.1 * np.random.default_rng(3).standard_normal(2 * 16000 + 77)
    soundfile.write(tier / "test.wav", samples, 16000, subtype="PCM_16")
    (tier / "test.txt").write_text("Eén keer.\n")
    return folder


@pytest.fixture(scope="session")
def columns(bundle: Path) -> list[Column]:
    """Both precisions; their models are loaded once."""
    return find_columns([bundle])


@pytest.fixture(scope="session")
def serve(columns: list[Column]) -> Serve:
    """Serves columns at a free port, as a context."""

    @contextmanager
    def call(limits: Limits | None = None, offered: list[Column] = columns) -> Iterator[Site]:
        site = Site(offered, "127.0.0.1", limits or Limits())
        loop = asyncio.new_event_loop()
        stop, ready = asyncio.Event(), asyncio.Event()
        is_open = threading.Event()

        async def run() -> None:
            running = asyncio.create_task(site.run(0, 2, stop, ready))
            await ready.wait()
            is_open.set()
            await running

        thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
        thread.start()
        assert is_open.wait(10)
        try:
            yield site
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join()
            loop.close()

    return call
