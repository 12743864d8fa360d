"""Streams in a pool: each as if it were alone, whatever the others do; hours cost no more."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from icetransfer.decode import decode_streams
from icetransfer.export import Source, export_tier
from icetransfer.model.transducer import TransducerModel, build_transducer
from icetransfer.streaming.exported import Exported
from icetransfer.streaming.onnx_model import OnnxTransducer
from icetransfer.streaming.search import SHERPA, make_search
from icetransfer.streaming.streams import StreamPool, serve

CHUNK, LEFT = 8, 16
SEARCHES = ("greedy_search", "modified_beam_search")


@pytest.fixture(scope="module")
def model(nano_dims) -> TransducerModel:
    """A random model that says something, not the same in every frame."""
    model = build_transducer(nano_dims, seed=5).eval()
    with torch.no_grad():
        model.joiner.output_linear.weight *= 8
        model.joiner.output_linear.bias[0] = 0.5
    return model


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory) -> OnnxTransducer:
    folder = tmp_path_factory.mktemp("streams")
    tokens = folder / "given.txt"
    names = ["<blk>", "<sos/eos>", "<unk>", *(f"t{i}" for i in range(3, 20))]
    tokens.write_text("".join(f"{name} {i}\n" for i, name in enumerate(names)))
    export_tier(Source(folder, model, tokens, "0" * 64), Exported(folder), CHUNK, LEFT, [])
    return OnnxTransducer(folder)


@pytest.fixture(scope="module")
def recordings() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    lengths = (9000, 30000, 100, 16000, 25000, 4000, 20000)
    time = np.arange(max(lengths)) / 16000
    return [
        (np.sin(2000 * (1 + k) * time**1.5) * 0.2 + 0.02 * rng.standard_normal(len(time)))[
            :length
        ].astype(np.float32)
        for k, length in enumerate(lengths)
    ]


def ticking(step_seconds: float) -> Callable[[], float]:
    """A clock that goes on so much each time that one looks."""
    counter = itertools.count()
    return lambda: step_seconds * next(counter)


def alone(model, search, recordings):
    searcher = make_search(search, model, 4, SHERPA)
    return [
        next(decode_streams(model, searcher, iter([("it", samples)]), CHUNK, LEFT, 1))[1]
        for samples in recordings
    ]


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_served_together_as_alone(request, model, engine, recordings, search) -> None:
    if engine == "onnxruntime":
        model = request.getfixturevalue("exported")
    expected = alone(model, search, recordings)
    assert sum(len(hypothesis.tokens) for hypothesis in expected) > 40
    for concurrent, step_seconds in ((3, 0.001), (3, 0.1), (7, 0.03)):
        pool = StreamPool(model, make_search(search, model, 4, SHERPA), CHUNK, LEFT)
        service = serve(pool, recordings, concurrent, ticking(step_seconds))
        assert [service.hypotheses[i] for i in range(len(recordings))] == expected
        assert not pool.live


@pytest.mark.parametrize("search", SEARCHES)
def test_pieces_of_any_size_and_results_on_the_way(model, recordings, search) -> None:
    (expected,) = alone(model, search, recordings[1:2])
    pool = StreamPool(model, make_search(search, model, 4, SHERPA), CHUNK, LEFT)
    pool.open(2)  # one beside it that hears nothing
    stream = pool.live[1]
    rng = np.random.default_rng(2)
    before, rest = [], recordings[1]
    while len(rest):
        size = int(rng.integers(1, 3000))
        stream.accept(rest[:size])
        rest = rest[size:]
        while pool.step():
            pass
        (now,) = pool.results([stream])
        assert now.tokens[: len(stream.settled.tokens)] == stream.settled.tokens
        before.append(len(now.tokens))
    stream.finish()
    while pool.step():
        pass
    assert stream.ended and pool.close([stream]) == [expected]
    assert len(set(before)) > 3 and before == sorted(before)


def test_the_time_line(model, recordings) -> None:
    """Steps that take no time delay nobody; slow ones do, and more speakers more so."""
    search = make_search("greedy_search", model, 4, SHERPA)

    def served(concurrent: int, step_seconds: float):
        pool = StreamPool(model, search, CHUNK, LEFT)
        return serve(pool, recordings, concurrent, ticking(step_seconds))

    quick, slow = served(3, 0.0), served(3, 0.5)
    assert max(quick.delays) == pytest.approx(0, abs=1e-6) and quick.busy_seconds == 0
    assert quick.audio_seconds == pytest.approx(sum(map(len, recordings)) / 16000)
    assert len(quick.delays) == len(slow.delays) and quick.calls > slow.calls
    assert slow.busy_seconds == pytest.approx(0.5 * slow.calls)
    assert min(slow.delays) >= 0.5 and np.mean(slow.delays) > 0.5
    # one speaker: a chunk each 160 ms, from when its window of 29 frames and one more are there
    one = served(1, 0.0)
    assert one.calls == len(one.delays) and max(one.delays) == pytest.approx(0, abs=1e-6)


def test_nothing_grows_with_the_length(model) -> None:
    pool = StreamPool(model, make_search("greedy_search", model, 4, SHERPA), CHUNK, LEFT)
    (stream,) = pool.open()
    rng = np.random.default_rng(4)
    for _ in range(20):
        stream.accept((0.1 * rng.standard_normal(16000)).astype(np.float32))
        while pool.step():
            pass
    assert stream.settled_frames > 450  # of 500
    assert pool._search_state.history.size(-1) == 0
    with pytest.raises(RuntimeError):  # the first frame is forgotten
        stream._fbank.get_frame(0)
