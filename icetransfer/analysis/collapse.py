"""Results that measure nothing: of a training that has collapsed, or has not begun to recognise.

Such a model says next to nothing: nearly every word is an error, and most errors are deletions.
Its WER is that of silence, whatever it started from.  In a mean over languages it would count as a
result, and the larger of two such numbers as the worse start.  So it is marked, and left out.
"""

from collections.abc import Mapping
from typing import Any

WER = 90.0  # percent
DELETIONS = 0.5  # share of the errors


def has_collapsed(result: Mapping[str, Any]) -> bool:
    """Whether a result is that of a model which says next to nothing.

    Args:
        result: `wer` in percent, and `errors` and `deletions` in words, as in wer.json.  Where one
            of them is not known, nothing can be said.
    """
    wer, errors, deletions = (result.get(key) for key in ("wer", "errors", "deletions"))
    if wer is None or errors is None or deletions is None:
        return False
    return bool(wer > WER and deletions > DELETIONS * errors)
