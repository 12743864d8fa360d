"""Results that measure nothing: of a training that has collapsed, or has not begun to recognise.

Such a model says next to nothing: nearly every word is an error, and most errors are deletions.
Its WER is that of silence, whatever it started from.  In a mean over languages it would count as a
result, and the larger of two such numbers as the worse start.  So it is marked, and left out.
"""

WER = 90.0  # percent
DELETIONS = 0.5  # share of the errors


def has_collapsed(wer: float, errors: int | None, deletions: int | None) -> bool:
    """Whether a result is that of a model which says next to nothing.

    Args:
        wer: in percent.
        errors: words that are wrong; None where that is not known, and then nothing can be said.
        deletions: those of them that were left out; None where that is not known.
    """
    if errors is None or deletions is None:
        return False
    return wer > WER and deletions > DELETIONS * errors
