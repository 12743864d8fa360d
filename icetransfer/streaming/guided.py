"""A beam search that is told more than the model knows: hotwords, and a language model of text.

As in sherpa-onnx, the K best pairs of hypothesis and token are chosen by the model and by what the
hypotheses have earned so far; what the new tokens themselves earn is added to those that were
chosen.  So the same settings give the same words there.

Shapes: as in `search.py`; D layers and H channels of the language model, D = 0 where there is none.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from icetransfer.model.language_model import BOUNDARY_ID, LanguageModel
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
    """A beam, how far each hypothesis is in a hotword, and what the language model expects."""

    graph: Tensor  # (N,) int64: the number of the stream's hotwords, or -1
    phrase: Tensor  # (N, K) int64: states of that graph
    expected: Tensor  # (N, K, V) log-probabilities of the next token by the language model
    hidden: Tensor  # (N, K, D, H)
    cell: Tensor  # (N, K, D, H)


class GuidedBeamSearch(ModifiedBeamSearch):
    """Modified beam search with hotwords, which may be others for each stream, and shallow fusion.

    A hypothesis earns the language model's log-probability of each of its tokens, times the scale;
    blank earns nothing (Kannan et al., An analysis of incorporating an external language model into
    a sequence-to-sequence model, arXiv:1712.01996).

    A graph lives as long as somebody holds it: this search the one that it was given, a `Stream`
    its own.

    Args:
        model: what scores the tokens.
        beam: K.
        convention: start context and silent tokens.
        blank_penalty: taken off blank's logit.
        hotwords: of the streams that begin; `with_hotwords` gives others to some.
        language_model: in the model's tokens.
        scale: on its log-probabilities.
    """

    def __init__(
        self,
        model: Predicts,
        beam: int = 4,
        convention: Convention = ICEFALL,
        blank_penalty: float = 0.0,
        hotwords: HotwordGraph | None = None,
        language_model: LanguageModel | None = None,
        scale: float = 0.0,
    ) -> None:
        super().__init__(model, beam, convention, blank_penalty)
        self._language_model, self._scale = language_model, scale
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

    @torch.inference_mode()
    def initial_state(self, batch_size: int) -> GuidedState:
        """See `Search`."""
        expected, hidden, cell = torch.empty(1, 0), torch.empty(1, 0, 0), torch.empty(1, 0, 0)
        if self._language_model is not None:
            first = self._language_model.initial_state(1)
            expected, hidden, cell = self._expect(torch.tensor([BOUNDARY_ID]), *first)

        def of_all(x: Tensor) -> Tensor:
            return x.expand(batch_size, self.beam, *x.shape[1:]).clone()

        plain = super().initial_state(batch_size)
        number = _NO_GRAPH if self._hotwords is None else self._hotwords.number
        return GuidedState(
            **{f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)},
            graph=torch.full((batch_size,), number),
            phrase=torch.zeros(batch_size, self.beam, dtype=torch.long),
            expected=of_all(expected),
            hidden=of_all(hidden),
            cell=of_all(cell),
        )

    def _expect(self, tokens: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, ...]:
        """The next (M, V), (M, D, H) twice, after tokens (M,) and states (D, M, H)."""
        assert self._language_model is not None
        log_probs, (hidden, cell) = self._language_model(tokens.unsqueeze(1), (hidden, cell))
        return log_probs.squeeze(1), hidden.transpose(0, 1), cell.transpose(0, 1)

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
        if self._language_model is not None:
            grown = self._fuse(before, grown, parent, emitted)
        return self._follow_phrases(before, grown, parent, emitted)

    def _fuse(
        self, before: GuidedState, grown: GuidedState, parent: Tensor, emitted: Tensor
    ) -> GuidedState:
        """Adds what the language model makes of the new tokens, and asks it for the next ones."""

        def inherit(x: Tensor) -> Tensor:
            index = parent.view(*parent.shape, *[1] * (x.dim() - 2))
            return x.gather(1, index.expand(-1, -1, *x.shape[2:]))

        expected, hidden, cell = map(inherit, (before.expected, before.hidden, before.cell))
        rows, places = (emitted != NOTHING).nonzero(as_tuple=True)
        log_prob = grown.log_prob.clone()
        if len(rows):
            tokens = emitted[rows, places].long()
            log_prob[rows, places] += self._scale * expected[rows, places, tokens]
            states = (x[rows, places].transpose(0, 1).contiguous() for x in (hidden, cell))
            found = self._expect(tokens, *states)
            for old, new in zip((expected, hidden, cell), found, strict=True):
                old[rows, places] = new
        return dataclasses.replace(
            grown, log_prob=log_prob, expected=expected, hidden=hidden, cell=cell
        )

    def _follow_phrases(
        self, before: GuidedState, grown: GuidedState, parent: Tensor, emitted: Tensor
    ) -> GuidedState:
        """Adds what hotwords make of the new tokens."""
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
