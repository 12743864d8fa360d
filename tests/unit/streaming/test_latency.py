"""From a word's end to its output: the arithmetic, and the moment at which a token really comes."""

import json

import numpy as np
import pytest

from icetransfer import decode, score
from icetransfer.data.tokenizer import Tokenizer
from icetransfer.export import Source, export_tier
from icetransfer.model.checkpoint import save_checkpoint
from icetransfer.model.transducer import build_transducer
from icetransfer.streaming import latency
from icetransfer.streaming.alignment import AlignedWord, SpokenWord, spoken_words
from icetransfer.streaming.exported import Exported, read_tokens
from icetransfer.streaming.sherpa import SherpaRecognizer


def test_a_word_waits_for_its_chunk_and_the_look_ahead() -> None:
    reference = [AlignedWord("een", 0.1, 0.5), AlignedWord("twee", 0.6, 0.9)]
    hypothesis = [SpokenWord("een", 8, 13), SpokenWord("drie", 17, 18)]
    (delay,) = latency.word_delays(reference, hypothesis, 16)
    # frame 13 begins at 520 ms, 20 ms after the word's end; its chunk ends at 640 ms
    assert delay == (pytest.approx(20), pytest.approx(120))
    assert delay.total == pytest.approx(640 - 500 + 130 + 17.5)
    (delay,) = latency.word_delays(reference, hypothesis[:1], 8)
    assert delay.total == pytest.approx(640 - 500 + 130 + 17.5)
    assert latency.word_delays([], hypothesis, 8) == latency.word_delays(reference, [], 8) == []


def test_measure() -> None:
    references = {
        "a": [AlignedWord("een", 0.1, 0.5), AlignedWord("twee", 0.6, 0.9)],
        "b": [AlignedWord("een", 0.0, 0.3)],
        "c": [AlignedWord("zes", 0.0, 0.3)],
    }
    hypotheses = {
        "a": [SpokenWord("een", 8, 13), SpokenWord("twee", 17, 23)],  # out at 640 and 960 + 147.5
        "b": [SpokenWord("een", 9, 9)],  # 480
        "c": [],
        "not aligned": [SpokenWord("een", 9, 9)],
    }
    found = latency.measure(references, hypotheses.items(), 8)
    totals = np.array([640 - 500, 960 - 900, 480 - 300]) + 147.5
    assert found["latency_ms_median"] == np.median(totals) and found["latency_words"] == 3
    assert found["latency_ms_p95"] == pytest.approx(np.percentile(totals, 95), abs=0.06)
    assert found["first_token_ms"] == np.median([480 - 100 + 147.5, 480 - 0 + 147.5])
    assert found["first_word_ms"] == np.median([totals[0], totals[2]])
    assert found["last_word_ms"] == np.median([totals[1], totals[2]])
    parts = found["latency_ms_parts"]
    assert parts["look_ahead"] == 130 and parts["runtime"] == 17.5
    assert sum(parts.values()) == pytest.approx(totals.mean(), abs=0.11)
    assert latency.measure({}, hypotheses.items(), 8) == {
        **dict.fromkeys(found),
        "latency_words": 0,
    }


@pytest.mark.parametrize("chunk_size", [8, 16])
def test_sherpa_says_a_token_when_the_arithmetic_says(chunk_size, nano_dims, tmp_path) -> None:
    tokens = tmp_path / "given.txt"
    names = ["<blk>", "<sos/eos>", "<unk>", "▁", "▁een", *(f"t{i}" for i in range(5, 20))]
    tokens.write_text("".join(f"{name} {i}\n" for i, name in enumerate(names)))
    model = build_transducer(nano_dims, seed=1).eval()
    model.joiner.output_linear.bias.data[4] = 9.0  # "een" in every frame
    bundle = Exported(tmp_path / "bundle")
    export_tier(Source(tmp_path, model, tokens, "0" * 64), bundle, chunk_size, 16, [])
    stream = SherpaRecognizer(bundle.dir, chunk_size).listen()
    came: list[int] = []
    step = 40  # samples: 2.5 ms, which divide what a chunk waits for
    for piece in range(1, 16000 // step):
        said = stream.accept(np.zeros(step, dtype=np.float32))
        came += [piece * step] * (len(said.tokens) - len(came))
    assert len(came) >= 12
    for word, samples in zip(spoken_words(said, read_tokens(bundle.tokens)), came, strict=True):
        start = AlignedWord("een", 0.0, 0.0)
        (delay,) = latency.word_delays([start], [word], chunk_size)
        assert delay.total == pytest.approx(samples / 16, abs=0.01)


def test_stage_9_measures_when_asked(tone_recipe, nano_dims) -> None:
    settings = "{engines: [torch], precisions: [fp32], chunk_sizes: [8, -1], latency: true}"
    experiment = tone_recipe("latency", f"decode={settings}")
    vocab_size = Tokenizer(experiment.lang_dir / "bpe.model").vocab_size
    model = build_transducer(nano_dims.with_vocabulary(vocab_size), seed=5)
    save_checkpoint(experiment.averaged_checkpoint, model)
    decode.decode_all(experiment)
    streaming, offline = (
        json.loads((run.folder(experiment.decode_dir) / "wer.json").read_text())
        for run in score.planned_runs(experiment.config)
    )
    assert "latency_ms_median" in streaming and "latency_ms_median" not in offline
    table, missing = score.results_table(experiment)
    assert [column.header for column in table.columns][-5:] == [*score.LATENCY_COLUMNS]
    assert missing == 0 and table.row_count == 2
