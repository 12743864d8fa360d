"""Rules of endpoints from utterances whose pauses are known."""

import numpy as np
import pytest

from icetransfer.bundle import endpoint
from icetransfer.bundle.readme import readme
from icetransfer.bundle.settings import RULES, Settings, read_settings, write_settings
from icetransfer.streaming.search import Hypothesis
from icetransfer.streaming.sherpa import SherpaRecognizer, Utterance


def utterance(frames: list[int], score: float = -0.1) -> Utterance:
    return Utterance(Hypothesis([5] * len(frames), frames), [score] * len(frames), 0)


def test_the_pause_is_that_of_all_but_one_in_a_hundred() -> None:
    # Pauses of 0, 1, ..., 199 frames of 40 ms between two tokens; two of 200 may be cut.
    heard = [utterance([10, 11 + blanks]) for blanks in range(200)]
    settings = endpoint.choose(heard, [float(n) / 5 for n in range(200)])
    assert settings.pause == pytest.approx(0.04 * 198 + 0.04)
    cut = sum(0.04 * blanks >= settings.pause - 1e-6 for blanks in range(200))
    assert cut <= 2
    assert settings.rules["rule1_min_trailing_silence"] == pytest.approx(2 * settings.pause)
    assert settings.rules["rule3_min_utterance_length"] == pytest.approx(39.6)
    assert "7.92 s" in settings.reasons["rule2"]


def test_short_pauses_and_few_utterances() -> None:
    heard = [utterance([n, n + 1]) for n in range(30)]
    settings = endpoint.choose(heard, [1.0] * 30)
    assert settings.pause == endpoint.FLOOR
    assert settings.rules["rule3_min_utterance_length"] == RULES["rule3_min_utterance_length"]
    few = endpoint.choose([*heard[:19], utterance([])], [1.0] * 20)
    assert few.rules == RULES and few.min_confidence == 0
    assert "19 recognised" in few.reasons["default"]


def test_the_least_confidence_is_below_that_of_speech() -> None:
    heard = [utterance([1, 2], np.log(0.5 + 0.004 * n)) for n in range(100)]
    settings = endpoint.choose(heard, [1.0] * 100)
    assert settings.min_confidence == pytest.approx(endpoint.MARGIN * 0.5, abs=1e-3)


def test_settings_come_back(tmp_path) -> None:
    assert read_settings(tmp_path) == Settings()
    settings = Settings({**RULES, "rule2_min_trailing_silence": 0.7}, 0.4, {"rule2": "measured"})
    write_settings(tmp_path, settings, chunk_size=16, sherpa_onnx={"modeling_unit": "bpe"})
    assert read_settings(tmp_path) == settings and settings.pause == 0.7
    (tmp_path / "bundle.json").write_text('{"format": 1, "sherpa_onnx": {}, "reasons": {}}')
    with pytest.raises(ValueError, match="lacks min_confidence"):
        read_settings(tmp_path)


def test_what_the_rules_do_is_measured(nano_bundle) -> None:
    """The model says a token in every frame: nothing ends an utterance but its length."""
    settings = Settings()
    options = settings.rules | {"enable_endpoint_detection": True}
    recognizer = SherpaRecognizer(nano_bundle.dir, 16, options=options)
    assert endpoint.measure(recognizer, [np.zeros(16000, dtype=np.float32)], settings) == {}


def test_the_readme_says_where_the_rules_come_from() -> None:
    bundle = {
        "chunk_size": 16,
        "precisions": ["fp32"],
        "bytes": {"fp32": 3_560_000},
        "tail": 0.76,
        "test": {"fp32": "een | twee"},
        "sherpa_onnx": {},
    }
    measured = {"cut_inside": 0.01, "delay_median": 0.76, "delay_p95": 0.9}
    reasons = {"utterances": 400, "rule2": "measured", "measured": measured}
    results = [
        {"test_set": name, "precision": "fp32", "engine": engine, "wer": 7.5}
        for name in ("slots", "talk")
        for engine in ("torch", "sherpa")
    ]
    text = readme(bundle, Settings(RULES, 0.5, reasons), "nl", "een of twee", results)
    assert "| fp32 | 3.56 | 7.50 | 7.50 | `een \\| twee` |" in text
    assert "400 utterances" in text and "end 1 % too early" in text and "is below 0.5," in text
    assert "| `--rule2-min-trailing-silence` | 1.2 s | measured |" in text
    assert "None" not in text
    text = readme(bundle, Settings(reasons={**reasons, "measured": {}}), "nl", "x", [])
    assert "does not fall silent" in text
