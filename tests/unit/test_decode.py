"""Stages 8 and 9 on a recipe of tones: files, failures, skipping, and no word lost."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import soundfile
import torch

from icetransfer import decode, export, score
from icetransfer.config import load_config
from icetransfer.data.features import read_manifest
from icetransfer.data.text.normalizer import Normalizer
from icetransfer.data.tokenizer import Tokenizer
from icetransfer.model.language_model import LanguageModel
from icetransfer.model.transducer import StreamingState
from icetransfer.streaming.search import GreedySearch
from icetransfer.training.language_model import make

TEST_SET = "tones"


@pytest.fixture(scope="module")
def decoded(tone_recipe, save_random_model):
    """An experiment whose random model is exported and decoded with every engine."""
    settings = "{engines: [torch, onnxruntime, sherpa], chunk_sizes: [8, -1], batch_streams: 3}"
    experiment = tone_recipe("decode", f"decode={settings}")
    save_random_model(experiment)
    export.export_tiers(experiment)
    decode.decode_all(experiment)
    return experiment


def rows_of(experiment, run):
    return score.read_rows(run.folder(experiment.decode_dir) / "recogs.jsonl")


def test_every_planned_run_is_there_and_engines_agree(decoded) -> None:
    runs = score.planned_runs(decoded.config)
    assert len(runs) == 2 * 5
    for size in (8, -1):
        same = [r for r in runs if r.chunk_size == size and r.precision == "fp32"]
        assert {r.engine for r in same} == {"torch", "onnxruntime", "sherpa"}
        torchs, *others = [rows_of(decoded, run) for run in same]
        assert torchs == others[0] == others[1]
        assert sum(len(row["tokens"]) for row in torchs) > 10


def test_wer_json(decoded) -> None:
    run = next(r for r in score.planned_runs(decoded.config) if r.engine == "sherpa")
    result = json.loads((run.folder(decoded.decode_dir) / "wer.json").read_text())
    rows = rows_of(decoded, run)
    assert result["chunk_ms"] == 160 and result["lookahead_ms"] == 130
    assert result["left_context_frames"] == 128
    assert result["words"] == sum(len(row["ref"].split()) for row in rows)
    assert result["errors"] == score.word_errors(rows).errors
    assert result["raw_wer"] == score.raw_word_errors(rows).rate
    assert result["errors"] == sum(
        result[key] for key in ("insertions", "deletions", "substitutions")
    )
    assert result["utterances"] == len(rows) == 4 and result["failed"] == 0
    assert result["model_bytes"] == sum(
        (decoded.onnx_dir(8) / f"{part}.onnx").stat().st_size
        for part in ("encoder", "decoder", "joiner")
    )
    assert result["rtf"] > 0 and result["init"] == "ml" and result["seed"] == 1
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)


def test_complete_runs_are_skipped_and_stale_bundles_refused(decoded, tmp_path) -> None:
    run = score.planned_runs(decoded.config)[0]
    target = run.folder(decoded.decode_dir) / "wer.json"
    before = target.stat().st_mtime_ns
    decode.decode_all(decoded)
    assert target.stat().st_mtime_ns == before
    sherpa = next(r for r in score.planned_runs(decoded.config) if r.engine == "sherpa")
    with pytest.raises(ValueError, match=r"was not exported from .* as it is now: run stage 8"):
        decode.decode_run(
            decoded, sherpa, [], {"checkpoint_sha256": "another sha256"}, Normalizer("nl")
        )


def test_one_bad_recording_costs_only_itself(decoded, tmp_path) -> None:
    cuts = read_manifest(decoded.manifests_dir / f"{TEST_SET}_test.jsonl.gz")
    for number, cut in enumerate(cuts):
        path = tmp_path / f"{cut.id}.flac"
        shutil.copy(cut.recording.sources[0].source, path)
        cut.recording.sources[0].source = str(path)
        if number == 1:
            path.write_bytes(b"this is not audio")
        elif number == 2:
            path.unlink()
        elif number == 3:
            samples = np.full(cut.recording.num_samples, np.nan, dtype=np.float32)
            wav = path.with_suffix(".wav")
            soundfile.write(wav, samples, 16000, subtype="FLOAT")
            cut.recording.sources[0].source = str(wav)
    run = score.planned_runs(decoded.config)[0]
    found, problems, _ = decode.recognise(decode.make_engine(decoded, run), cuts, "bad")
    assert found.keys() == {cuts[0].id} and problems.keys() == {cut.id for cut in cuts[1:]}
    assert all(str(tmp_path) in problem for problem in problems.values())
    tokenizer = Tokenizer(decoded.lang_dir / "bpe.model")
    rows = decode.make_rows(cuts, found, problems, tokenizer, Normalizer("nl"))
    result = decode.make_result(decoded.config, run, rows)
    assert result["failed"] == 3 and result["utterances"] == 4
    assert result["deletions"] >= sum(len(row["ref"].split()) for row in rows[1:])
    assert re.search(f"{cuts[1].id}: .*{cuts[1].id}.flac", score.errors_text(rows, "bad"))


class HearsSounds:
    """A model that says token 3 on every encoder frame (40 ms) with a sound."""

    context_size = 1

    def initial_state(self, batch_size, chunk_size, left_context_frames):
        lens = torch.zeros(batch_size, dtype=torch.int64)
        return StreamingState((), torch.zeros(batch_size, 1), lens, chunk_size, 64)

    def encode_chunk(self, features, state):
        """Puts out, for each 40 ms, whether any of its feature frames is loud."""
        chunk = 2 * state.chunk_size
        loud = (features[:, :chunk].amax(dim=2) > -8).float()
        return loud.unflatten(1, (-1, 4)).amax(dim=2, keepdim=True), state

    def predict(self, tokens):
        return torch.zeros(len(tokens), 1, 1)

    def join(self, out_frame, decoder_out):
        return torch.cat([0.5 - 0 * out_frame, 0 * out_frame, 0 * out_frame, out_frame], dim=2)


@pytest.mark.parametrize("chunk_size", [8, 16, 32, 64])
def test_the_last_sound_is_heard_whatever_the_length(chunk_size) -> None:
    """A click at the very end of recordings of every length about a chunk's."""
    model = HearsSounds()
    lengths = [160, 800, *range(4000, 4000 + 640 * chunk_size, 997)]
    waveforms = []
    for number, length in enumerate(lengths):
        samples = np.zeros(length, dtype=np.float32)
        samples[-80:] = 0.5 * np.sin(np.arange(80))
        waveforms.append((str(number), samples))
    found = dict(
        decode.decode_streams(model, GreedySearch(model), iter(waveforms), chunk_size, 64, 4)
    )
    assert len(found) == len(lengths)
    for number, length in enumerate(lengths):
        last = (length - 1) // 640
        assert found[str(number)].tokens and set(found[str(number)].timestamps) <= {
            last - 1,
            last,
            last + 1,
        }


def test_batches_keep_within_their_limits() -> None:
    waveforms = [(str(n), np.zeros(n * 16000, dtype=np.float32)) for n in range(1, 9)]
    groups = [keys for keys, _ in decode.batches(iter(waveforms), 3, 20)]
    assert groups == [["1", "2", "3"], ["4", "5", "6"], ["7", "8"]]
    assert [keys for keys, _ in decode.batches(iter(waveforms), 9, 12)] == [
        ["1", "2", "3"],
        ["4", "5"],
        ["6"],
        ["7"],
        ["8"],
    ]


def test_hotwords(decoded, tmp_path) -> None:
    """They are counted, make a result another, and bad lines are told before any work."""
    path = tmp_path / "hotwords.txt"
    path.write_text("zes\ndrie vijf :4\n")
    with pytest.raises(ValueError, match="hotwords need search=modified_beam_search"):
        load_config([], ["decode={hotwords: x}"])
    keys = {"search": "modified_beam_search", "engines": ["torch"], "chunk_sizes": [8]}
    results = []
    for more in ({}, {"hotwords": path}, {"hotwords": path, "hotwords_score": 5.0}):
        section = decoded.config.decode.model_copy(update=keys | more)
        config = decoded.config.model_copy(update={"decode": section})
        experiment = dataclasses.replace(decoded, config=config)
        decode.decode_all(experiment)
        (run,) = [r for r in score.planned_runs(config) if r.precision == "fp32"]
        target = run.folder(experiment.decode_dir) / "wer.json"
        results.append(json.loads(target.read_text()))
    assert len({result["hotwords"] for result in results}) == 3 and not results[0]["hotwords"]
    assert "hotwords_found" not in results[0]
    rows = rows_of(experiment, run)
    counted = score.hotword_counts(rows, ["zes", "drie vijf"])
    assert counted.items() <= results[2].items() and counted["hotwords_missed"] > 0
    path.write_text("zes\nquatsch\n")
    with pytest.raises(ValueError, match=rf"{path}:2: 'quatsch' has"):
        decode.decode_all(experiment)


def test_hotwords_are_counted() -> None:
    rows = [{"ref": "a b a b c", "hyp": "a b c"}, {"ref": "c", "hyp": "c c a"}]
    found = score.hotword_counts(rows, ["a b", "c", "c a", "b"])
    assert [*found.values()] == [4, 2, 2]


def test_a_language_model(tone_recipe, save_random_model, tmp_path) -> None:
    """Every engine says the same with it, and something else than without."""
    settings = "decode={engines: [torch, onnxruntime, sherpa], chunk_sizes: [8], precisions: [fp32]"
    settings += ", search: modified_beam_search}"
    small = "language_model={text: transcripts, channels: 16, max_epochs: 2, learning_rate: 0.03}"
    scaled = "decode.language_model_scale=40"
    for words, message in (
        (["decode={language_model_scale: 1}"], "needs search=modified_beam_search"),
        ([settings, scaled], "needs a language model"),
        ([settings, small, scaled, "decode.chunk_sizes=[-1]"], "does no shallow fusion"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config([], ["language=nl", "data.corpora={a: {kind: folder, path: x}}", *words])
    experiment = tone_recipe("fusion", settings, small, scaled)
    save_random_model(experiment)
    export.export_tiers(experiment)
    with pytest.raises(ValueError, match=r"lstm.pt does not exist: run stage 8"):
        decode.decode_all(experiment)
    make(experiment)
    runs = score.planned_runs(experiment.config)
    said = []
    for scale in (40.0, 0.0):
        section = experiment.config.decode.model_copy(update={"language_model_scale": scale})
        config = experiment.config.model_copy(update={"decode": section})
        decode.decode_all(dataclasses.replace(experiment, config=config))
        torchs, *others = [[row["tokens"] for row in rows_of(experiment, run)] for run in runs]
        assert torchs == others[0] == others[1]
        said.append(torchs)
    assert said[0] != said[1]
    target = runs[0].folder(experiment.decode_dir) / "wer.json"
    assert json.loads(target.read_text())["language_model"] == ""
    small = LanguageModel(7, 8, 1)
    torch.save({"sizes": small.sizes, "model": small.state_dict()}, experiment.language_model)
    with pytest.raises(ValueError, match="is of 7 tokens and the experiment has 30"):
        decode.decode_all(experiment)
