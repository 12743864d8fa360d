"""When a stream is decoded: at the sample that fills its chunk, and not before."""

import queue

import numpy as np
import pytest

from icetransfer.serving.engine import Engine, Stream
from icetransfer.streaming.streams import samples_for


@pytest.fixture
def engine():
    engine = Engine(2)
    yield engine
    engine.close()


def test_a_chunk_is_decoded_with_the_sample_that_fills_it(engine, columns) -> None:
    updates = queue.Queue()
    stream = Stream(columns[0], columns[0].listen(), updates.put)
    for chunks in (1, 2, 3):
        missing = samples_for(16, chunks) - stream._heard - stream._waiting
        engine.hear(stream, np.zeros(missing - 1, np.float32))
        with pytest.raises(queue.Empty):
            updates.get(timeout=0.2)
        engine.hear(stream, np.zeros(1, np.float32))
        assert updates.get(timeout=20).heard == samples_for(16, chunks) / 16000
        while stream._is_busy:
            pass


def test_what_came_at_once_is_decoded_to_its_end(engine, columns) -> None:
    updates = queue.Queue()
    stream = Stream(columns[0], columns[0].listen(), updates.put)
    engine.hear(stream, np.zeros(80_000, np.float32))
    engine.finish(stream)
    found = [updates.get(timeout=20)]
    while not found[-1].is_last:
        found.append(updates.get(timeout=20))
    assert found[-1].heard == 5.0 and found[-1].ended and found[-1].partial is None
