"""Chooses the rules of endpoints, and the least confidence, from what a tier makes of a dev set.

The pauses that speakers make inside an utterance say how long rule 2 must wait: it is the shortest
silence that cuts at most `MAY_BE_CUT` of the utterances.  Silence is counted as sherpa-onnx counts
it, in encoder frames without a token, so it holds the model's own delays too.  The time until the
first token gives rule 1, the length of the longest utterances rule 3, and the confidence of the
least sure utterances the confidence below which a segment counts as noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icetransfer.bundle.settings import RULES, Settings
from icetransfer.data.utterances import SAMPLING_RATE
from icetransfer.streaming.alignment import OUTPUT_SECONDS
from icetransfer.streaming.segments import probability
from icetransfer.streaming.sherpa import SherpaRecognizer, Utterance

MAY_BE_CUT = 0.01  # of the utterances, by rule 2 and, apart from that, by the least confidence
ENOUGH = 20  # utterances, fewer of which say nothing
FLOOR = 0.5  # seconds: recordings of sentences have fewer pauses than talk
MARGIN = 0.9  # of the least sure utterances' confidence
BATCH = 16  # recordings at a time

Samples = NDArray[np.float32]


def hear(recognizer: SherpaRecognizer, recordings: Sequence[Samples]) -> list[Utterance]:
    """What a recogniser without endpoints makes of recordings."""
    parts = (recordings[i : i + BATCH] for i in range(0, len(recordings), BATCH))
    return [utterance for part in parts for utterance in recognizer.utterances(list(part))]


def longest_pause(frames: Sequence[int]) -> float:
    """Seconds of the longest silence between two tokens at these encoder frames."""
    return OUTPUT_SECONDS * (int(max(np.diff(frames), default=1)) - 1)


def _upper(values: Sequence[float]) -> float:
    """A value that at most `MAY_BE_CUT` of the values exceed, and that is one of them."""
    return float(np.quantile(values, 1 - MAY_BE_CUT, method="higher"))


def choose(heard: Sequence[Utterance], seconds: Sequence[float]) -> Settings:
    """The settings for a tier.

    Args:
        heard: the utterances of a dev set, without endpoints.
        seconds: how long each is.
    """
    spoken = [utterance for utterance in heard if utterance.scores]
    if len(spoken) < ENOUGH:
        why = f"the dev set has {len(spoken)} recognised utterances, fewer than {ENOUGH}"
        return Settings(reasons={"default": f"sherpa-onnx's own rules: {why}"})
    frames = [utterance.hypothesis.timestamps for utterance in spoken]
    pause = _upper([longest_pause(times) for times in frames])
    rule2 = max(pause + OUTPUT_SECONDS, FLOOR)
    first = _upper([OUTPUT_SECONDS * times[0] for times in frames])
    rule1 = max(first, 2 * rule2)
    rule3 = max(_upper(seconds), RULES["rule3_min_utterance_length"])
    sure = [probability(utterance.scores) for utterance in spoken]
    least = MARGIN * float(np.quantile(sure, MAY_BE_CUT, method="lower"))
    share = f"{100 * MAY_BE_CUT:g} %"
    return Settings(
        {
            "rule1_min_trailing_silence": round(rule1, 2),
            "rule2_min_trailing_silence": round(rule2, 2),
            "rule3_min_utterance_length": round(rule3, 1),
        },
        round(least, 3),
        {
            "utterances": len(spoken),
            "rule1": f"twice rule 2, or {first:.2f} s until the first token, of all but {share}",
            "rule2": f"pauses inside all but {share} of the utterances are at most {pause:.2f} s "
            f"and an encoder frame more ends a segment; never below {FLOOR:g} s",
            "rule3": f"{_upper(seconds):.1f} s, the length of all but {share} of the utterances, "
            f"or sherpa-onnx's 20 s",
            "min_confidence": f"{MARGIN:g} of that of all but {share} of the utterances",
        },
    )


def measure(
    recognizer: SherpaRecognizer, recordings: Sequence[Samples], settings: Settings
) -> dict[str, Any]:
    """What the rules do to the dev set, each utterance of which is followed by silence.

    Args:
        recognizer: with these rules.
        recordings: of the dev set.
        settings: the rules.

    Returns:
        `cut_inside`, the share of utterances that an endpoint ended before their last token, and
        the seconds of audio from the last token to the endpoint, `delay_median` and `delay_p95`.
        Nothing where no endpoint was found: the model does not fall silent.
    """
    silence = np.zeros(round((settings.pause + 2) * SAMPLING_RATE), dtype=np.float32)
    delays, cut, counted = [], 0, 0
    for samples in recordings:
        stream = recognizer.listen()
        stream.accept(samples)
        stream.accept(silence)
        spoken = [ended for ended in stream.take_ended() if ended.scores]
        counted += bool(spoken)
        cut += len(spoken) > 1 or bool(stream.current().scores)
        delays += [
            OUTPUT_SECONDS * (ended.end - ended.hypothesis.timestamps[-1]) for ended in spoken[-1:]
        ]
    if not delays:
        return {}
    median, late = (round(float(np.percentile(delays, q)), 2) for q in (50, 95))
    return {"cut_inside": round(cut / counted, 4), "delay_median": median, "delay_p95": late}
