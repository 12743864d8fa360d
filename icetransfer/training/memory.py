"""A batch that does not fit into the memory, computed in halves, quarters, ...

Losses are sums over utterances, and so are their gradients: pieces give what the whole would.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType

import torch

from icetransfer.data.loader import Batch
from icetransfer.experiment import log
from icetransfer.training.faults import is_out_of_memory


class Attempt:
    """One try at a batch; as a context, it takes note of an error that says out of memory.

    Attributes:
        pieces: how many at most each share is split into.
        failure: the first line of that error; "" while there was none.
    """

    def __init__(self, pieces: int) -> None:
        self.pieces = pieces
        self.failure = ""

    def __enter__(self) -> Attempt:
        """Nothing to prepare."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        """Suppresses an error that says out of memory, and no other."""
        if error is None or not is_out_of_memory(error):
            return False
        self.failure = (str(error) or "no memory left").splitlines()[0]
        return True


def until_it_fits(step: int, shares: Sequence[Batch]) -> Iterator[Attempt]:
    """Attempts at a step's shares, in more and more pieces, until one of them succeeds.

        for attempt in until_it_fits(step, shares):
            with attempt:
                ...  # computes every share in attempt.pieces

    Raises:
        ValueError: a single utterance does not fit.
    """
    pieces = 1
    while True:
        attempt = Attempt(pieces)
        yield attempt
        if not attempt.failure:
            return
        # Here, where the error and with it the tensors of the failed attempt are gone.
        names = ", ".join(name for share in shares for name in share.ids)
        most = max(len(share.ids) for share in shares)
        size = f"{most} cuts of up to {max(s.features.size(1) for s in shares) / 100:.1f} s"
        if pieces >= most:
            raise ValueError(
                f"step {step}: out of memory ({attempt.failure}) even with one utterance at a "
                f"time, in the batch of {size}: {names}. Lower data.max_seconds or take a larger "
                f"machine"
            )
        pieces = min(2 * pieces, most)
        log.warning(
            "step %d: out of memory (%s) on the batch of %s: %s; trying again in %d pieces. If "
            "this happens often, lower train.batch_seconds, and say --change",
            step, attempt.failure, size, names, pieces,
        )  # fmt: skip
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
