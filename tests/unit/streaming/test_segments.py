"""Recordings as segments: where they end, and that no word is lost or parted there."""

import numpy as np
import pytest

from icetransfer.bundle.settings import RULES
from icetransfer.streaming import segments
from icetransfer.streaming.captions import Captions, JsonLines, SubRip, WebVtt
from icetransfer.streaming.exported import Exported, read_tokens
from icetransfer.streaming.search import Hypothesis
from icetransfer.streaming.segments import Segment, StreamingListener, Word, speech_parts
from icetransfer.streaming.sherpa import SherpaRecognizer, Utterance

NAMES = ["<blk>", "<sos/eos>", "<unk>", "▁een", "▁tw", "ee"]
MINUTE = 60 * 16000


class Stream:
    """Says what endpoints have ended."""

    def __init__(self, *ended: Utterance) -> None:
        self.ended = list(ended)

    def accept(self, samples: np.ndarray) -> None:
        pass

    finish = lambda self: None  # noqa: E731

    def take_ended(self) -> list[Utterance]:
        ended, self.ended = self.ended, []
        return ended

    def current(self) -> Utterance:
        return segments.NOTHING


def listen(*ended: Utterance, least: float = 0.0) -> list[Segment]:
    class Recognizer:
        def listen(self) -> Stream:
            return Stream(*ended)

    listener = StreamingListener(Recognizer(), NAMES, 0.6, least)  # type: ignore[arg-type]
    return listener.accept(np.zeros(1)) + listener.finish()


def test_words_have_times_and_confidences() -> None:
    (segment,) = listen(Utterance(Hypothesis([3, 4, 5], [2, 5, 7]), [-1.0, -0.5, -1.5], 40))
    assert segment.text == "een twee" and (segment.start, segment.end) == (0.08, 0.32)
    assert [word.confidence for word in segment.words] == pytest.approx([np.exp(-1)] * 2)
    assert segment.words[1][1:3] == (0.2, 0.32)


def test_a_segment_cut_in_a_word_gives_it_to_the_next() -> None:
    first = Utterance(Hypothesis([3, 4], [490, 499]), [-0.1, -0.1], 500)  # by rule 3: no silence
    second = Utterance(Hypothesis([5, 3], [502, 510]), [-0.1, -0.1], 540)
    assert [segment.text for segment in listen(first, second)] == ["een", "twee een"]
    assert [segment.text for segment in listen(first)] == ["een", "tw"]
    alone = Utterance(Hypothesis([3], [499]), [-0.1], 500)  # nothing to hold it back for
    assert [segment.text for segment in listen(alone, second)] == ["een", "ee een"]


def test_what_the_model_hardly_believes_in_is_left_out() -> None:
    sure = Utterance(Hypothesis([3], [2]), [-0.1], 40)
    unsure = Utterance(Hypothesis([3, 3], [50, 60]), [-0.1, -3.0], 90)
    assert len(listen(sure, unsure, least=0.5)) == 1 and len(listen(sure, unsure)) == 2


def test_pieces_of_any_size_give_the_same_segments(nano_bundle: Exported) -> None:
    rng = np.random.default_rng(5)
    samples = (0.1 * rng.standard_normal(MINUTE // 2)).astype(np.float32)
    rules = {**RULES, "rule3_min_utterance_length": 5.0, "enable_endpoint_detection": True}
    recognizer = SherpaRecognizer(nano_bundle.dir, 16, options=rules, tail_seconds=0.8)
    names = read_tokens(nano_bundle.tokens)
    found = []
    for size in (1600, 16000, len(samples)):
        listener = StreamingListener(recognizer, names, 1.2, 0.0)
        heard = [
            s for i in range(0, len(samples), size) for s in listener.accept(samples[i : i + size])
        ]
        found.append(heard + listener.finish())
    assert found[0] == found[1] == found[2]
    assert 5 <= len(found[0]) <= 7  # the last word of each is held back
    words = [word for segment in found[0] for word in segment.words]
    whole = SherpaRecognizer(nano_bundle.dir, 16, tail_seconds=0.8)([samples])[0]
    assert [word.start for word in words] == pytest.approx([0.04 * t for t in whole.timestamps])


def test_parts_lie_between_the_pauses() -> None:
    rng = np.random.default_rng(6)
    samples = (0.001 * rng.standard_normal(MINUTE // 2)).astype(np.float32)
    spoken = [(16000, 48000), (80000, 112000), (116000, 120000), (160000, 200000)]
    for begin, end in spoken:
        samples[begin:end] += 0.2 * rng.standard_normal(end - begin).astype(np.float32)
    parts, rest = speech_parts(samples, pause=0.5)
    assert parts == [(12000, 52000), (76000, 124000), (156000, 204000)]  # 0.25 s around each
    assert rest == len(samples) - 4000
    unending = (0.2 * rng.standard_normal(MINUTE // 2)).astype(np.float32)
    unending[400000:402000] *= 0.1
    ((begin, end),), rest = speech_parts(unending, pause=0.5)
    assert begin == 0 and end == rest and 400000 <= end <= 402000


def test_captions() -> None:
    words = [Word("a", 0.5, 0.9, 0.61), Word("<b>", 1.0, 8.9, 0.99)]
    segment = Segment(words, 0.8)
    assert Captions()(segment) == "0.50\t8.90\ta <b>\n"
    assert Captions("f.wav")(segment).startswith("f.wav\t0.50\t")
    assert '"confidence": 0.61, "word": "a"' in JsonLines()(segment)
    subrip = SubRip()
    assert subrip(segment) == (
        "1\n00:00:00,500 --> 00:00:00,900\na\n\n2\n00:00:01,000 --> 00:00:08,900\n<b>\n\n"
    )
    assert subrip(segment).startswith("3\n")
    assert "<00:00:01.000><c.p90>&lt;b&gt;</c>" in WebVtt()(segment)
    long = Segment([Word("w" * 9, n, n + 0.1, 1.0) for n in np.arange(0, 5, 0.25)], 1.0)
    shown = SubRip()(long).split("\n\n")[:-1]
    assert len(shown) > 2
    assert all(len(line) <= 42 for text in shown for line in text.split("\n"))
    assert all(len(text.split("\n")) <= 4 for text in shown)
