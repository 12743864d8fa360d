"""What arXiv:2606.24169 reports, to compare with: another architecture and data, not our results.

A 0.6 B FastConformer transducer, eight European languages, 100 to 2500 h of training data.
"""

import numpy as np

from icetransfer.analysis.laws import PowerLaw, fit_power_law

CITATION = "arXiv:2606.24169"
SETTING = (
    f"{CITATION}: FastConformer transducer of 0.6 B parameters, FLEURS at 160 ms, mean of eight "
    f"European languages"
)
POINTS = ((100.0, 4.21), (2500.0, 0.20))  # hours, WER(en) - WER(ml) in points
LATENCY = "The gap is about the same at every latency (160, 560, 1120 ms and offline)."
FOUR_BIT = "4-bit weights of the encoder at 560 ms: about 3 times smaller, about +0.5 WER points."


def law() -> PowerLaw:
    """The law through the two points."""
    hours, gaps = zip(*POINTS, strict=True)
    return fit_power_law(hours, [np.array([gap]) for gap in gaps])


def statement() -> str:
    """The law in words, with what two points cannot do."""
    found = law()
    return (
        f"The two points alone give gap = a × hours^-{found.b:.2f}, "
        f"{found.factor_per_doubling:.2f} per doubling; two points fix such a law and cannot test "
        f"it."
    )
