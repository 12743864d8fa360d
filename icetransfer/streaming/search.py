"""Greedy and modified beam search over encoder frames, at once or chunk by chunk, many streams.

Shapes: N streams, T encoder frames (40 ms), C encoder channels, K hypotheses of a stream, L tokens
of decoder context, D decoder channels, V vocabulary, F frames of a stream since its batch began.

Both emit at most one token a frame, so a hypothesis is a row with one entry a frame: the token
emitted there, or NOTHING.  Any model with `context_size`, `predict` and `join` will do.

Sources: Graves, Sequence Transduction with RNNs (2012), greedy search; Kang et al., Fast and
parallel decoding for transducer (arXiv:2211.00484), modified beam search.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from icetransfer.data.tokenizer import BLANK_ID, UNK_ID
from icetransfer.streaming.hotwords import HotwordGraph

NOTHING = -1
# Odd multiplier of a 64-bit hash of histories (the golden ratio, as in Knuth's hashing).
_HASH_FACTOR = -7046029254386353131


class Predicts(Protocol):
    """What a search needs of a model."""

    context_size: int

    def predict(self, tokens: Tensor) -> Tensor:
        """Decoder output (N, 1, D) after tokens (N, L)."""

    def join(self, out_frame: Tensor, decoder_out: Tensor) -> Tensor:
        """Logits (N, 1, V) of (N, 1, C) and (N, 1, D)."""


@dataclass(frozen=True)
class Convention:
    """Where toolkits differ although the model is the same.

    Attributes:
        start: what fills the decoder's context before the blank that every history starts with: -1
            (a zero embedding, as the model was trained) or 0 (blank).
        silent: tokens that are treated as blank when they win.
    """

    start: int = -1
    silent: tuple[int, ...] = ()


#: The default of the functions here: what the published numbers of a checkpoint were made with.
ICEFALL = Convention()
#: sherpa-onnx never prints `<unk>`.  The decode stage follows it with every engine: what is scored
#: is what a user will run, and the engines' tokens can be compared.  The start context is icefall's
#: in sherpa-onnx 2.0.1 (measured, all its transducer searches); older releases start from blanks.
SHERPA = Convention(silent=(UNK_ID,))


class Hypothesis(NamedTuple):
    """What a search found for one stream."""

    tokens: list[int]
    timestamps: list[int]  # encoder frames (40 ms) at which the tokens were emitted


S = TypeVar("S", bound="SearchState")


@dataclass
class SearchState:
    """What a search carries from chunk to chunk; dimension 0 of every tensor is the stream."""

    history: Tensor  # (N, F) or (N, K, F) int32: tokens, or NOTHING
    start: Tensor  # (N,) int64: the column of `history` at which each stream began

    def select(self: S, rows: list[int]) -> S:
        """The state of some of the streams, in that order."""
        index = torch.tensor(rows, dtype=torch.long)
        picked = {f.name: getattr(self, f.name)[index] for f in dataclasses.fields(self)}
        if rows:  # forget what was before the oldest stream, or the history would grow for ever
            oldest = int(picked["start"].min())
            picked["history"] = picked["history"][..., oldest:]
            picked["start"] = picked["start"] - oldest
        return type(self)(**picked)

    def extend(self: S, other: S) -> S:
        """The streams of this state, then those of `other`, which begin now."""
        frames, missing = self.history.size(-1), self.history.size(-1) - other.history.size(-1)
        late = dataclasses.replace(
            other,
            history=torch.nn.functional.pad(other.history, (missing, 0), value=NOTHING),
            start=torch.full_like(other.start, frames),
        )
        return type(self)(
            **{
                f.name: torch.cat([getattr(self, f.name), getattr(late, f.name)])
                for f in dataclasses.fields(self)
            }
        )


class Search(Generic[S]):
    """A search over the frames of several streams.

    Args:
        model: what scores the tokens.
        convention: start context and silent tokens.
        blank_penalty: taken off blank's logit; above zero for fewer deletions.
    """

    def __init__(
        self, model: Predicts, convention: Convention = ICEFALL, blank_penalty: float = 0.0
    ) -> None:
        self.model = model
        self.convention = convention
        self.blank_penalty = blank_penalty

    def initial_state(self, batch_size: int) -> S:
        """The state of `batch_size` streams before their first frame."""
        raise NotImplementedError

    def with_hotwords(self, hotwords: HotwordGraph) -> Search[S]:
        """This search with hotwords for the streams that begin.

        Raises:
            ValueError: it is one that takes none.
        """
        raise ValueError("hotwords need a GuidedBeamSearch: this search takes none")

    def advance(self, state: S, out: Tensor, out_lens: Tensor | None = None) -> S:
        """Consumes encoder frames.

        Args:
            state: before these frames; it is not changed.
            out: (N, T, C) encoder output of the same streams.
            out_lens: (N,) frames to read, or None for all T.

        Returns:
            The state after them.
        """
        raise NotImplementedError

    def best(self, state: S) -> Tensor:
        """The best history of each stream, (N, F)."""
        raise NotImplementedError

    def agreed(self, state: S) -> Tensor:
        """How much of the history of each stream can change no more, (N,) frames of F."""
        raise NotImplementedError

    def results(self, state: S) -> list[Hypothesis]:
        """The best hypothesis of each stream so far."""
        found = []
        for row, start in zip(self.best(state).tolist(), state.start.tolist(), strict=True):
            emitted = [(t, token) for t, token in enumerate(row[start:]) if token != NOTHING]
            found.append(Hypothesis([token for _, token in emitted], [t for t, _ in emitted]))
        return found

    def __call__(self, out: Tensor, out_lens: Tensor) -> list[Hypothesis]:
        """Searches whole utterances: out (N, T, C), out_lens (N,)."""
        return self.results(self.advance(self.initial_state(out.size(0)), out, out_lens))

    def _start_context(self, *batch: int) -> Tensor:
        context = torch.full((*batch, self.model.context_size), self.convention.start)
        context[..., -1] = BLANK_ID
        return context

    def _logits(self, frame: Tensor, decoder_out: Tensor) -> Tensor:
        logits = self.model.join(frame, decoder_out).squeeze(1)
        if self.blank_penalty:
            logits = logits.clone()
            logits[:, BLANK_ID] -= self.blank_penalty
        return logits

    def _emitted(self, tokens: Tensor) -> Tensor:
        emitted = tokens != BLANK_ID
        for token in self.convention.silent:
            emitted &= tokens != token
        return emitted


@dataclass
class GreedyState(SearchState):
    """One hypothesis a stream."""

    context: Tensor  # (N, L) int64
    decoder_out: Tensor  # (N, 1, D)


class GreedySearch(Search[GreedyState]):
    """The best token of each frame."""

    def initial_state(self, batch_size: int) -> GreedyState:
        """See `Search`."""
        context = self._start_context(batch_size)
        return GreedyState(
            history=torch.empty(batch_size, 0, dtype=torch.int32),
            start=torch.zeros(batch_size, dtype=torch.long),
            context=context,
            decoder_out=self.model.predict(context),
        )

    @torch.inference_mode()
    def advance(
        self, state: GreedyState, out: Tensor, out_lens: Tensor | None = None
    ) -> GreedyState:
        """See `Search`."""
        context, decoder_out = state.context, state.decoder_out
        columns = []
        for t in range(out.size(1)):
            tokens = self._logits(out[:, t : t + 1], decoder_out).argmax(dim=1)
            emitted = self._emitted(tokens)
            if out_lens is not None:
                emitted &= t < out_lens
            columns.append(torch.where(emitted, tokens, NOTHING))
            rows = emitted.nonzero().squeeze(1)
            if len(rows):
                moved = torch.cat([context[rows, 1:], tokens[rows, None]], dim=1)
                context = context.index_copy(0, rows, moved)
                decoder_out = decoder_out.index_copy(0, rows, self.model.predict(moved))
        new = torch.stack(columns, dim=1).int()
        history = torch.cat([state.history, new], dim=1)
        return GreedyState(history, state.start, context, decoder_out)

    def best(self, state: GreedyState) -> Tensor:
        """See `Search`."""
        return state.history

    def agreed(self, state: GreedyState) -> Tensor:
        """See `Search`."""
        return torch.full_like(state.start, state.history.size(1))


@dataclass
class BeamState(SearchState):
    """K hypotheses a stream; a place that holds none has log_prob -inf."""

    context: Tensor  # (N, K, L) int64
    log_prob: Tensor  # (N, K)
    count: Tensor  # (N, K) int64, tokens of the hypothesis
    hash: Tensor  # (N, K) int64, of its tokens: equal histories have equal hashes


class ModifiedBeamSearch(Search[BeamState]):
    """The `beam` best histories, where paths that emitted the same tokens are one history.

    Args:
        model: what scores the tokens.
        beam: K.
        convention: start context and silent tokens.
        blank_penalty: taken off blank's logit.
    """

    def __init__(
        self,
        model: Predicts,
        beam: int = 4,
        convention: Convention = ICEFALL,
        blank_penalty: float = 0.0,
    ) -> None:
        super().__init__(model, convention, blank_penalty)
        self.beam = beam

    def initial_state(self, batch_size: int) -> BeamState:
        """See `Search`."""
        log_prob = torch.full((batch_size, self.beam), -torch.inf)
        log_prob[:, 0] = 0.0
        zeros = torch.zeros(batch_size, self.beam, dtype=torch.long)
        return BeamState(
            history=torch.empty(batch_size, self.beam, 0, dtype=torch.int32),
            start=torch.zeros(batch_size, dtype=torch.long),
            context=self._start_context(batch_size, self.beam),
            log_prob=log_prob,
            count=zeros,
            hash=zeros,
        )

    @torch.inference_mode()
    def advance(self, state: BeamState, out: Tensor, out_lens: Tensor | None = None) -> BeamState:
        """See `Search`."""
        before = state.history.size(2)
        room = torch.nn.functional.pad(state.history, (0, out.size(1)), value=NOTHING)
        state = dataclasses.replace(state, history=room)
        for t in range(out.size(1)):
            stepped = self._step(state, out[:, t : t + 1], before + t)
            state = stepped if out_lens is None else _where(t < out_lens, stepped, state)
        return state

    def _step(self, state: BeamState, frame: Tensor, column: int) -> BeamState:
        streams, beam = state.log_prob.shape
        decoder_out = self.model.predict(state.context.flatten(0, 1))
        logits = self._logits(frame.repeat_interleave(beam, dim=0), decoder_out)
        scores = logits.log_softmax(dim=1).view(streams, beam, -1) + state.log_prob.unsqueeze(2)
        log_prob, best = scores.flatten(1).topk(beam, dim=1)  # in descending order
        parent, token = best // scores.size(2), best % scores.size(2)
        emitted = self._emitted(token)

        def inherit(x: Tensor) -> Tensor:
            index = parent.view(streams, beam, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
            return x.gather(1, index)

        context, history = inherit(state.context), inherit(state.history)
        history[:, :, column] = torch.where(emitted, token, NOTHING).int()
        moved = torch.cat([context[:, :, 1:], token.unsqueeze(2)], dim=2)
        old_hash = inherit(state.hash)
        new_hash = torch.where(emitted, (old_hash + token + 1) * _HASH_FACTOR, old_hash)
        grown = dataclasses.replace(
            state,
            history=history,
            context=torch.where(emitted.unsqueeze(2), moved, context),
            log_prob=log_prob,
            count=inherit(state.count) + emitted,
            hash=new_hash,
        )
        grown = self._rescore(state, grown, parent, history[:, :, column])
        return dataclasses.replace(grown, log_prob=_merge_equal(new_hash, grown.log_prob))

    def _rescore(
        self, before: BeamState, grown: BeamState, parent: Tensor, emitted: Tensor
    ) -> BeamState:
        """What else than the model has a say in the hypotheses that were chosen: here nothing.

        Args:
            before: the state before the frame.
            grown: after it, with the scores of the model.
            parent: (N, K) the hypothesis of `before` that each comes from.
            emitted: (N, K) its token of this frame, or NOTHING.
        """
        return grown

    def best(self, state: BeamState) -> Tensor:
        """See `Search`; log-probabilities are divided by the length, start context included."""
        score = state.log_prob / (state.count + self.model.context_size)
        index = score.argmax(dim=1).view(-1, 1, 1).expand(-1, 1, state.history.size(2))
        return state.history.gather(1, index).squeeze(1)

    def agreed(self, state: BeamState) -> Tensor:
        """See `Search`: up to the first frame in which hypotheses differ."""
        other = state.history != self.best(state).unsqueeze(1)
        differs = (other & (state.log_prob > -torch.inf).unsqueeze(2)).any(dim=1)
        return (differs.cumsum(dim=1) == 0).sum(dim=1).maximum(state.start)


def _merge_equal(key: Tensor, log_prob: Tensor) -> Tensor:
    """Adds up (in probability) the entries of a row with equal keys, into the first of them.

    Args:
        key: (N, K).
        log_prob: (N, K).

    Returns:
        (N, K), -inf where an entry was merged into an earlier one.
    """
    equal = key.unsqueeze(2) == key.unsqueeze(1)
    total = log_prob.unsqueeze(1).masked_fill(~equal, -torch.inf).logsumexp(dim=2)
    return total.masked_fill(equal.tril(-1).any(dim=2), -torch.inf)


def _where(condition: Tensor, yes: BeamState, no: BeamState) -> BeamState:
    """Picks whole streams: rows of `yes` where the condition (N,) holds, else of `no`."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(condition.view(-1, *[1] * (a.dim() - 1)), a, b)

    fields = dataclasses.fields(yes)
    return type(yes)(**{f.name: pick(getattr(yes, f.name), getattr(no, f.name)) for f in fields})


def make_search(
    name: str, model: Predicts, beam: int, convention: Convention = ICEFALL
) -> Search[Any]:
    """The search that a config names: "greedy_search" or "modified_beam_search"."""
    if name == "greedy_search":
        return GreedySearch(model, convention)
    return ModifiedBeamSearch(model, beam, convention)


def greedy_search(
    model: Predicts, out: Tensor, out_lens: Tensor, blank_penalty: float = 0.0
) -> list[list[int]]:
    """Decodes a batch with at most one token a frame, as icefall's batched greedy search.

    Args:
        model: a transducer.
        out: (N, T, C) encoder output.
        out_lens: (N,) frames that count.
        blank_penalty: taken off blank's logit.

    Returns:
        The tokens of each utterance.
    """
    search = GreedySearch(model, blank_penalty=blank_penalty)
    return [hypothesis.tokens for hypothesis in search(out, out_lens)]


def modified_beam_search(
    model: Predicts, out: Tensor, out_lens: Tensor, beam: int = 4, blank_penalty: float = 0.0
) -> list[list[int]]:
    """Decodes a batch with `beam` hypotheses and at most one token a frame.

    Args:
        model: a transducer.
        out: (N, T, C) encoder output.
        out_lens: (N,) frames that count.
        beam: hypotheses kept for each utterance.
        blank_penalty: taken off blank's logit.

    Returns:
        The tokens of the best hypothesis of each utterance.
    """
    search = ModifiedBeamSearch(model, beam, blank_penalty=blank_penalty)
    return [hypothesis.tokens for hypothesis in search(out, out_lens)]
