"""A beam search that is told more than the model knows: the hotwords of each stream.

As in sherpa-onnx, the K best pairs of hypothesis and token are chosen by the model and by what the
hypotheses have earned so far; what the new tokens themselves earn is added to those that were
chosen.  So the same settings give the same words there.

Shapes: as in `search.py`.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from icetransfer.streaming.hotwords import HotwordGraph
from icetransfer.streaming.search import (
    ICEFALL,
    NOTHING,
    BeamState,
    Convention,
    Hypothesis,
    ModifiedBeamSearch,
    Predicts,
)

_NO_GRAPH = -1


@dataclass
class GuidedState(BeamState):
    """A beam, and how far each hypothesis is in a hotword."""

    graph: Tensor  # (N,) int64: the number of the stream's hotwords, or -1
    phrase: Tensor  # (N, K) int64: states of that graph


class GuidedBeamSearch(ModifiedBeamSearch):
    """Modified beam search with hotwords, which may be others for each stream.

    A graph lives as long as somebody holds it: this search the one that it was given, a `Stream`
    its own.

    Args:
        model: what scores the tokens.
        beam: K.
        convention: start context and silent tokens.
        blank_penalty: taken off blank's logit.
        hotwords: of the streams that begin; `with_hotwords` gives others to some.
    """

    def __init__(
        self,
        model: Predicts,
        beam: int = 4,
        convention: Convention = ICEFALL,
        blank_penalty: float = 0.0,
        hotwords: HotwordGraph | None = None,
    ) -> None:
        super().__init__(model, beam, convention, blank_penalty)
        self._graphs: WeakValueDictionary[int, HotwordGraph] = WeakValueDictionary()
        self._set(hotwords)

    def _set(self, hotwords: HotwordGraph | None) -> None:
        self._hotwords = hotwords
        if hotwords is not None:
            self._graphs[hotwords.number] = hotwords

    def with_hotwords(self, hotwords: HotwordGraph) -> GuidedBeamSearch:
        """This search, whose new streams have these hotwords; states of both may be joined."""
        other = copy.copy(self)
        other._set(hotwords)
        return other

    def initial_state(self, batch_size: int) -> GuidedState:
        """See `Search`."""
        plain = super().initial_state(batch_size)
        number = _NO_GRAPH if self._hotwords is None else self._hotwords.number
        return GuidedState(
            **{f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)},
            graph=torch.full((batch_size,), number),
            phrase=torch.zeros(batch_size, self.beam, dtype=torch.long),
        )

    def __call__(self, out: Tensor, out_lens: Tensor) -> list[Hypothesis]:
        """Searches whole utterances; a phrase that the end breaks off loses what it has earned."""
        state = self.advance(self.initial_state(out.size(0)), out, out_lens)
        assert isinstance(state, GuidedState)
        log_prob = state.log_prob.clone()
        for row, number in enumerate(state.graph.tolist()):
            if number != _NO_GRAPH:
                graph = self._graphs[number]
                lost = [graph.unfinished(phrase) for phrase in state.phrase[row].tolist()]
                log_prob[row] -= torch.tensor(lost)
        return self.results(dataclasses.replace(state, log_prob=log_prob))

    def _rescore(
        self, before: BeamState, grown: BeamState, parent: Tensor, emitted: Tensor
    ) -> BeamState:
        assert isinstance(before, GuidedState) and isinstance(grown, GuidedState)
        phrase = before.phrase.gather(1, parent)
        bonus = torch.zeros_like(grown.log_prob)
        for row, number in enumerate(before.graph.tolist()):
            if number == _NO_GRAPH:
                continue
            graph = self._graphs[number]
            for place, token in enumerate(emitted[row].tolist()):
                if token != NOTHING:
                    score, following = graph.step(int(phrase[row, place]), token)
                    bonus[row, place] = score
                    phrase[row, place] = following
        return dataclasses.replace(grown, log_prob=grown.log_prob + bonus, phrase=phrase)
