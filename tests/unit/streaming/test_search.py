"""Search behaviour on a made-up model: conventions, merging, joining and leaving streams."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from icetransfer.streaming.search import (
    SHERPA,
    Convention,
    GreedySearch,
    ModifiedBeamSearch,
    greedy_search,
    make_search,
    modified_beam_search,
)

VOCAB = 5


class Scripted:
    """The encoder frame is the logits; the decoder adds a fixed random bigram score."""

    context_size = 2

    def __init__(self, strength: float = 0.0) -> None:
        random = torch.Generator().manual_seed(3)
        self.bigram = strength * torch.randn(VOCAB + 1, VOCAB, generator=random)
        self.contexts: list[list[int]] = []

    def predict(self, tokens: Tensor) -> Tensor:
        self.contexts += tokens.tolist()
        return self.bigram[tokens[:, -1]].unsqueeze(1)

    def join(self, out_frame: Tensor, decoder_out: Tensor) -> Tensor:
        return out_frame + decoder_out


def frames(*tokens: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor([tokens]), VOCAB).float() * 9


def random_frames(streams: int, length: int) -> Tensor:
    return 2 * torch.randn(streams, length, VOCAB, generator=torch.Generator().manual_seed(7))


def test_one_symbol_a_frame_with_timestamps() -> None:
    (found,) = GreedySearch(Scripted())(frames(0, 3, 3, 0, 4), torch.tensor([5]))
    assert found.tokens == [3, 3, 4] and found.timestamps == [1, 2, 4]


def test_frames_past_the_length_are_not_read() -> None:
    out, lens = frames(3, 0, 4, 1).repeat(2, 1, 1), torch.tensor([4, 2])
    assert greedy_search(Scripted(), out, lens) == [[3, 4, 1], [3]]
    assert modified_beam_search(Scripted(), out, lens) == [[3, 4, 1], [3]]


@pytest.mark.parametrize("name", ["greedy_search", "modified_beam_search"])
def test_conventions(name) -> None:
    model = Scripted()
    (found,) = make_search(name, model, 2)(frames(2, 3), torch.tensor([2]))
    assert found.tokens == [2, 3] and model.contexts[0] == [-1, 0]
    (found,) = make_search(name, model, 2, SHERPA)(frames(2, 3), torch.tensor([2]))
    assert found.tokens == [3] and found.timestamps == [1]
    model.contexts.clear()
    make_search(name, model, 2, Convention(start=0))(frames(2, 3), torch.tensor([2]))
    assert model.contexts[0] == [0, 0]


def best_by_enumeration(model: Scripted, out: Tensor) -> list[int]:
    """Sums the probability of every path, by history; the best by length-normalised score."""
    total: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(VOCAB), repeat=out.size(0)):
        last, log_prob = 0, 0.0
        for t, token in enumerate(path):
            log_prob += float((out[t] + model.bigram[last]).log_softmax(0)[token])
            last = token or last
        history = tuple(token for token in path if token)
        total[history] = math.log(math.exp(total.get(history, -math.inf)) + math.exp(log_prob))
    return list(max(total, key=lambda h: total[h] / (len(h) + model.context_size)))


def test_a_wide_beam_finds_the_best_history_of_all() -> None:
    model = Scripted(strength=1.0)
    out = random_frames(4, 4)
    found = modified_beam_search(model, out, torch.full((4,), 4), beam=VOCAB**4)
    assert found == [best_by_enumeration(model, row) for row in out]


@pytest.mark.parametrize("name", ["greedy_search", "modified_beam_search"])
def test_streams_that_come_and_go_do_not_change_each_other(name) -> None:
    model = Scripted(strength=1.0)
    out = random_frames(3, 12)
    search = make_search(name, model, 3)
    whole = search(out, torch.full((3,), 12))
    # streams 0 and 1 begin; 2 comes at frame 4; 0 leaves at 8; the others go on to their ends
    state = search.advance(search.initial_state(2), out[:2, :4])
    state = state.extend(search.initial_state(1))
    state = search.advance(state, torch.cat([out[:2, 4:8], out[2:, :4]]))
    assert search.results(state.select([0])) == search(out[:1, :8], torch.tensor([8]))
    state = state.select([2, 1])
    state = search.advance(state, torch.stack([out[2, 4:8], out[1, 8:12]]))
    assert search.results(state)[1] == whole[1]
    state = state.select([0])
    assert state.history.size(-1) == 8  # nothing is kept of before the stream began
    state = search.advance(state, out[2:, 8:])
    assert search.results(state) == whole[2:]


def test_blank_penalty_makes_more_tokens() -> None:
    out, lens = random_frames(3, 20), torch.full((3,), 20)
    for search in (greedy_search, modified_beam_search):
        plain = sum(map(len, search(Scripted(), out, lens)))
        assert sum(map(len, search(Scripted(), out, lens, blank_penalty=2.0))) > plain


def test_advance_leaves_the_state_as_it_was() -> None:
    search = ModifiedBeamSearch(Scripted(), beam=2)
    state = search.initial_state(1)
    first = search.results(search.advance(state, frames(3, 4)))
    assert search.results(search.advance(state, frames(3, 4))) == first
