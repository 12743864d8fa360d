"""Stage 9: recognises every test set with every engine, precision and latency tier of the config.

    python -m icetransfer.decode --exp DIR

A tier with a chunk size is true streaming: chunks with carried state, many streams in a batch that
begin and end at different times.  All engines get the same audio with the same silence after it and
follow the same conventions, so that their tokens agree.

Shapes: N streams, T feature frames (10 ms), c chunk_size (20 ms).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from lhotse import set_current_audio_backend
from lhotse.audio.backend import LibsndfileBackend
from lhotse.cut import Cut
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from icetransfer import score
from icetransfer.config import LOOK_AHEAD_MS, Config, chunk_label, chunk_ms
from icetransfer.data.features import PADDING, fbank, read_manifest
from icetransfer.data.text.normalizer import Normalizer
from icetransfer.data.tokenizer import Tokenizer
from icetransfer.data.utterances import SAMPLING_RATE
from icetransfer.experiment import Experiment, log, provenance, run_stage, write_provenance
from icetransfer.model.checkpoint import load_transducer
from icetransfer.model.language_model import LanguageModel, load_language_model
from icetransfer.stage import atomic
from icetransfer.stage.json_file import read_json
from icetransfer.stage.progress import progress_bar
from icetransfer.stage.stamp import sha256
from icetransfer.streaming import latency
from icetransfer.streaming.alignment import OUTPUT_SECONDS, AlignedWord, align, spoken_words
from icetransfer.streaming.exported import Exported
from icetransfer.streaming.guided import GuidedBeamSearch
from icetransfer.streaming.hotwords import (
    Hotword,
    HotwordGraph,
    read_hotwords,
    warn_of_high_scores,
)
from icetransfer.streaming.onnx_model import OnnxTransducer
from icetransfer.streaming.search import SHERPA, Hypothesis, Search, make_search
from icetransfer.streaming.sherpa import SherpaRecognizer
from icetransfer.streaming.streams import Encodes, Samples, Stream, StreamPool, tail_seconds

OFFLINE_BATCH_SECONDS = 300  # of padded audio: full attention grows with the square of the length

#: Takes (id, samples) one by one, gives (id, hypothesis) in any order.
Engine = Callable[[Iterator[tuple[str, Samples]]], Iterator[tuple[str, Hypothesis]]]
#: Changes a recording: takes its cut's id and its samples.
Change = Callable[[str, Samples], Samples]
#: Gives the words of a test set's references and when they were spoken, by cut id.
References = Callable[[], dict[str, list[AlignedWord]]]


class EncodesWhole(Protocol):
    """What offline decoding needs of a model besides what a search needs."""

    def encode(self, features: Tensor, feature_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Whole utterances (N, T, 80), (N,)."""


def decode_streams(
    model: Encodes,
    search: Search[Any],
    waveforms: Iterator[tuple[str, Samples]],
    chunk_size: int,
    left_context_frames: int,
    batch_streams: int,
) -> Iterator[tuple[str, Hypothesis]]:
    """Streaming recognition: a stream that ends makes room for the next one.

    Args:
        model: torch's or onnxruntime's.
        search: of the same model.
        waveforms: (id, samples at 16 kHz).
        chunk_size: in 50 Hz frames.
        left_context_frames: in 50 Hz frames.
        batch_streams: streams at a time.

    Yields:
        (id, hypothesis), as streams end.
    """
    pool = StreamPool(model, search, chunk_size, left_context_frames)
    keys: dict[Stream, str] = {}
    while True:
        new = list(islice(waveforms, batch_streams - len(pool.live)))
        if new:
            for (key, samples), stream in zip(new, pool.open(len(new)), strict=True):
                stream.accept(samples)
                stream.finish()
                keys[stream] = key
        if not pool.live:
            return
        pool.step()
        ended = [stream for stream in pool.live if stream.ended]
        for stream, hypothesis in zip(ended, pool.close(ended) if ended else (), strict=True):
            yield keys.pop(stream), hypothesis


def batches(
    waveforms: Iterator[tuple[str, Samples]], batch_streams: int, seconds: float
) -> Iterator[tuple[list[str], list[Samples]]]:
    """Groups recordings in order; at most `batch_streams` and `seconds` of padded audio a group.

    The front end's last frames see the padding of their batch, so all engines get the same groups.
    """
    keys: list[str] = []
    group: list[Samples] = []
    longest = 0
    for key, samples in waveforms:
        longest = max(longest, len(samples))
        padded = longest * (len(group) + 1) / SAMPLING_RATE
        if group and (len(group) == batch_streams or padded > seconds):
            yield keys, group
            keys, group, longest = [], [], len(samples)
        keys.append(key)
        group.append(samples)
    if group:
        yield keys, group


def _features(samples: Samples, tail: float) -> Tensor:
    silence = np.zeros(round(tail * SAMPLING_RATE), dtype=np.float32)
    return torch.from_numpy(fbank(np.concatenate([samples, silence])))


@torch.inference_mode()
def decode_offline(
    model: EncodesWhole,
    search: Search[Any],
    waveforms: Iterator[tuple[str, Samples]],
    batch_streams: int,
) -> Iterator[tuple[str, Hypothesis]]:
    """Recognition with full context.

    Args:
        model: torch's or onnxruntime's.
        search: of the same model.
        waveforms: (id, samples at 16 kHz).
        batch_streams: recordings at a time, at most.

    Yields:
        (id, hypothesis), in order.
    """
    for keys, group in batches(waveforms, batch_streams, OFFLINE_BATCH_SECONDS):
        features = [_features(samples, tail_seconds(-1)) for samples in group]
        lens = torch.tensor([len(f) for f in features])
        padded = pad_sequence(features, batch_first=True, padding_value=PADDING)
        yield from zip(keys, search(*model.encode(padded, lens)), strict=True)


def find_hotwords(experiment: Experiment) -> list[Hotword]:
    """The hotwords that the config names, if any.

    Raises:
        ValueError: the file is missing, or lines of it are wrong.
    """
    decode = experiment.config.decode
    if decode.hotwords is None:
        return []
    tokenizer = Tokenizer(experiment.lang_dir / "bpe.model")
    return read_hotwords(
        decode.hotwords,
        tokenizer.encode,
        tokenizer.unknown_characters,
        Normalizer(experiment.config.language),
        decode.hotwords_score,
    )


def find_language_model(experiment: Experiment) -> LanguageModel | None:
    """The language model, where the config gives it a scale.

    Raises:
        ValueError: it is missing, or of other tokens.
    """
    if not experiment.config.decode.language_model_scale:
        return None
    tokenizer = Tokenizer(experiment.lang_dir / "bpe.model")
    return load_language_model(experiment.language_model, tokenizer.vocab_size)


def make_engine(experiment: Experiment, run: score.Decoding) -> Engine:
    """Loads the model of a run.

    Raises:
        ValueError: a file is missing, or the export is of another checkpoint or tier.
    """
    decode = experiment.config.decode
    size, left, streams = run.chunk_size, run.left_context_frames, decode.batch_streams
    hotwords, scale = find_hotwords(experiment), decode.language_model_scale
    if run.engine == "sherpa":
        lm = {"lm": str(experiment.language_model.with_suffix(".onnx")), "lm_scale": scale}
        recognizer = SherpaRecognizer(
            experiment.onnx_dir(size),
            size,
            run.precision,
            run.search,
            decode.beam,
            tail_seconds(size),
            options=lm if scale else {},
            hotwords=hotwords,
        )

        def recognize(waveforms: Iterator[tuple[str, Samples]]) -> Iterator[tuple[str, Hypothesis]]:
            seconds = OFFLINE_BATCH_SECONDS if size == -1 else np.inf
            for keys, group in batches(waveforms, streams, seconds):
                yield from zip(keys, recognizer(group), strict=True)

        return recognize
    if run.engine == "torch":
        model: Any = load_transducer(experiment.averaged_checkpoint)
    else:
        model = OnnxTransducer(experiment.onnx_dir(size), run.precision)
    search = make_search(run.search, model, decode.beam, SHERPA)
    if hotwords or scale:
        graph = HotwordGraph(hotwords) if hotwords else None
        lm_model = find_language_model(experiment)
        search = GuidedBeamSearch(model, decode.beam, SHERPA, 0.0, graph, lm_model, scale)
    if size == -1:
        return lambda waveforms: decode_offline(model, search, waveforms, streams)
    return lambda waveforms: decode_streams(model, search, waveforms, size, left, streams)


class Reader:
    """Reads the recordings of a test set one by one; a bad one is noted and left out.

    Args:
        cuts: one for each recording.
        change: what is done to each, if anything.

    Attributes:
        problems: why a recording could not be read, by the cut's id.
        seconds: time spent reading so far, which is not recognition.
    """

    def __init__(self, cuts: Iterable[Cut], change: Change | None = None) -> None:
        self._cuts, self._change = cuts, change
        self.problems: dict[str, str] = {}
        self.seconds = 0.0

    def __iter__(self) -> Iterator[tuple[str, Samples]]:
        """Yields (id, samples)."""
        for cut in self._cuts:
            begin = time.perf_counter()
            try:
                samples = _read(cut)
                if self._change is not None:
                    samples = self._change(cut.id, samples)
            except Exception as error:  # whatever a decoder raises on a broken file
                reason = " ".join(str(error).split()) or repr(error)
                self.problems[cut.id] = f"{cut.recording.sources[0].source}: {reason}"
                log.warning("cut %s cannot be recognised: %s", cut.id, self.problems[cut.id])
                continue
            finally:
                self.seconds += time.perf_counter() - begin
            yield cut.id, samples


def _read(cut: Cut) -> Samples:
    samples: Samples = np.asarray(cut.load_audio(), dtype=np.float32)
    if cut.sampling_rate != SAMPLING_RATE or samples.shape[0] != 1:
        raise ValueError(
            f"expected one channel at {SAMPLING_RATE} Hz, got {samples.shape[0]} at "
            f"{cut.sampling_rate} Hz"
        )
    if samples.shape[1] == 0 or not np.isfinite(samples).all():
        raise ValueError("the audio is empty or holds samples that are not numbers")
    mono: Samples = samples[0]
    return mono


def recognise(
    engine: Engine, cuts: list[Cut], title: str, change: Change | None = None
) -> tuple[dict[str, Hypothesis], dict[str, str], float]:
    """Recognises a test set.

    Args:
        engine: see `make_engine`.
        cuts: of the test set; they are read from the shortest to the longest.
        title: of the progress bar.
        change: what is done to each recording before, if anything.

    Returns:
        Hypotheses by cut id, reasons of failure by cut id, and seconds without reading.
    """
    reader = Reader(sorted(cuts, key=lambda cut: (cut.duration, cut.id)), change)
    found = {}
    with progress_bar() as progress:
        bar = progress.add_task(title, total=len(cuts))
        begin = time.perf_counter()
        for key, hypothesis in engine(iter(reader)):
            found[key] = hypothesis
            progress.update(bar, completed=len(found) + len(reader.problems))
        seconds = time.perf_counter() - begin - reader.seconds
        progress.update(bar, completed=len(cuts))
    return found, reader.problems, seconds


def make_rows(
    cuts: list[Cut],
    found: dict[str, Hypothesis],
    problems: dict[str, str],
    tokenizer: Tokenizer,
    normalize: Normalizer,
) -> list[score.Row]:
    """The lines of recogs.jsonl, in the order of the cuts."""
    rows: list[score.Row] = []
    for cut in cuts:
        supervision = cut.supervisions[0]
        text = supervision.text or ""
        tokens, frames = found.get(cut.id, Hypothesis([], []))
        said = tokenizer.decode(tokens)
        rows.append(
            {
                "id": cut.id,
                "speaker": supervision.speaker or "",
                "ref": normalize.scored(normalize(text)),
                "hyp": normalize.scored(normalize(said)),
                "raw_ref": (supervision.custom or {}).get("raw_text", text),
                "raw_hyp": said,
                "audio_seconds": round(cut.duration, 3),
                "tokens": tokens,
                "timestamps": [round(frame * OUTPUT_SECONDS, 2) for frame in frames],
                "failed": problems.get(cut.id),
            }
        )
    return rows


def make_result(
    config: Config, run: score.Decoding, rows: list[score.Row], by_character: bool = False
) -> dict[str, Any]:
    """What wer.json holds, but for speed, size and provenance.

    With `by_character` the words of the rows are characters, and WER and CER are the same.
    """
    words = score.word_errors(rows)
    characters = words if by_character else score.character_errors(rows)
    offline = run.chunk_size == -1
    left = run.left_context_frames
    return {
        "language": config.language,
        "init": config.init,
        "hours": config.hours,
        "seed": config.seed,
        "delay_penalty": config.train.delay_penalty,
        "test_set": run.test_set,
        "engine": run.engine,
        "precision": run.precision,
        "chunk_size": run.chunk_size,
        "chunk_ms": chunk_ms(run.chunk_size),
        "lookahead_ms": 0 if offline else LOOK_AHEAD_MS,
        "left_context_frames": -1 if offline else left,
        "effective_left_context_frames": -1 if offline else left - left % run.chunk_size,
        "search": run.search,
        "unit": "character" if by_character else "word",
        "wer": words.rate,
        "raw_wer": score.raw_word_errors(rows).rate,
        "errors": words.errors,
        "words": words.length,
        "insertions": words.insertions,
        "deletions": words.deletions,
        "substitutions": words.substitutions,
        "cer": characters.rate,
        "character_errors": characters.errors,
        "characters": characters.length,
        "utterances": len(rows),
        "failed": sum(row["failed"] is not None for row in rows),
        "audio_seconds": round(sum(row["audio_seconds"] for row in rows), 3),
    }


def align_references(
    experiment: Experiment, cuts: list[Cut], normalize: Normalizer
) -> dict[str, list[AlignedWord]]:
    """When each word of a test set was spoken, by cut id; what cannot be aligned is left out.

    Raises:
        ValueError: the model has no CTC head.
    """
    model = load_transducer(experiment.averaged_checkpoint)
    tokenizer = Tokenizer(experiment.lang_dir / "bpe.model")
    if model.ctc_output is None:
        raise ValueError(
            f"decode.latency needs a model with a CTC head, which {experiment.averaged_checkpoint} "
            f"has not: train with transfer.ctc=true, or set decode.latency=false"
        )
    texts = {cut.id: normalize(cut.supervisions[0].text or "") for cut in cuts}
    aligned = {}
    for key, samples in Reader(cuts):
        words = texts[key].split()
        try:
            times = align(model, samples, [tokenizer.encode(word) for word in words])
        except ValueError as error:
            log.warning("cut %s: no latency: %s", key, error)
            continue
        aligned[key] = [AlignedWord(word, *time) for word, time in zip(words, times, strict=True)]
    return aligned


def decode_run(
    experiment: Experiment,
    run: score.Decoding,
    cuts: list[Cut],
    made_from: Mapping[str, str | int],
    normalize: Normalizer,
    references: References | None = None,
    change: Change | None = None,
    more: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda result: {},
) -> None:
    """Decodes one test set in one way, unless that is done for what there is now.

    The latency is measured where `references` are given and the tier is a streaming one.

    Args:
        experiment: whose model it is.
        run: which set, engine and tier.
        cuts: of the test set.
        made_from: what wer.json says of its sources; where that differs, it is decoded again.
        normalize: of the test set's language.
        references: when words were spoken.
        change: what is done to each recording before, if anything.
        more: what wer.json says besides, of a result.

    Raises:
        ValueError: the model's files are missing or are of another checkpoint.
    """
    config = experiment.config
    folder = run.folder(experiment.decode_dir)
    target = folder / "wer.json"
    quantisation = Exported(experiment.onnx_dir(run.chunk_size)).quantisation(run.precision)
    if target.is_file():
        found = {"hotwords": "", "language_model": ""} | read_json(target, ())  # of others: none
        made = {key: found[key] for key in made_from if key in found}
        changed = [key for key in made if made[key] != made_from[key]]
        if found.get("quantisation", {}) != quantisation:
            changed.append("quantisation")
        if not changed:
            log.info("skip: %s is complete", target)
            return
        log.info("%s is of another %s: decoding again", target, " and ".join(changed))
    if run.engine == "torch":
        model_bytes = experiment.averaged_checkpoint.stat().st_size
    else:
        model_bytes = _check_export(experiment, run, str(made_from["checkpoint_sha256"]))
    load = os.getloadavg()[0]
    title = f"{run.test_set} {run.engine} {run.precision} {chunk_label(run.chunk_size)}"
    found, problems, seconds = recognise(make_engine(experiment, run), cuts, title, change)
    tokenizer = Tokenizer(experiment.lang_dir / "bpe.model")
    rows = make_rows(cuts, found, problems, tokenizer, normalize)
    result = make_result(config, run, rows, normalize.spaceless) | {
        "rtf": seconds / max(sum(cut.duration for cut in cuts if cut.id in found), 1e-9),
        "batch_streams": config.decode.batch_streams,
        "threads": 1,
        "host_load": load,
        "model_bytes": model_bytes,
        "quantisation": quantisation,
        **made_from,
        "provenance": provenance(),
    }
    if hotwords := find_hotwords(experiment):
        phrases = {normalize.scored(hotword.text) for hotword in hotwords}
        result |= score.hotword_counts(rows, phrases)
    if references and run.chunk_size != -1:
        heard = ((key, spoken_words(said, tokenizer.tokens)) for key, said in found.items())
        result |= latency.measure(references(), heard, run.chunk_size)
    result |= more(result)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    atomic.write_text(folder / "recogs.jsonl", lines)
    atomic.write_text(folder / "errs.txt", score.errors_text(rows, title, normalize.spaceless))
    atomic.write_text(target, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    log.info(
        "%s: %sCER %.2f %%, %d failed, RTF %.4f -> %s",
        title,
        "" if normalize.spaceless else f"WER {result['wer']:.2f} %, ",
        result["cer"],
        result["failed"],
        result["rtf"],
        folder,
    )


def _check_export(experiment: Experiment, run: score.Decoding, checkpoint_sha256: str) -> int:
    exported = Exported(experiment.onnx_dir(run.chunk_size))
    exported.check(run.precision)
    made_of = {}
    if exported.description.is_file():
        made_of = read_json(exported.description, ["made_of"])["made_of"]
    if made_of.get("sha256") != checkpoint_sha256:
        raise ValueError(
            f"{exported.dir} was not exported from {experiment.averaged_checkpoint} as it is now: "
            f"run stage 8 again"
        )
    return exported.size(run.precision)


def _read_test_set(path: Path) -> list[Cut]:
    cuts = read_manifest(path)
    if not cuts:
        raise ValueError(f"{path} has no recordings: nothing to decode; see stage 1's log for why")
    return cuts


class Source(NamedTuple):
    """What is decoded of a test set, and what its wer.json says of where it comes from."""

    cuts: list[Cut]
    normalize: Normalizer
    made_from: dict[str, str | int]


def checkpoint_digest(experiment: Experiment) -> str:
    """The SHA-256 of the weights that are decoded.

    Raises:
        ValueError: stage 7 has not made them.
    """
    torch.set_num_threads(1)
    set_current_audio_backend(LibsndfileBackend())  # others try many readers on a broken file
    if not experiment.averaged_checkpoint.is_file():
        raise ValueError(
            f"{experiment.averaged_checkpoint} does not exist: run stage 7, which makes it"
        )
    return sha256(experiment.averaged_checkpoint)


def test_sources(experiment: Experiment, checkpoint_sha256: str) -> Iterator[tuple[str, Source]]:
    """Every test set by its name, of the weights with that digest.

    Raises:
        ValueError: something that an earlier stage makes is missing.
    """
    decode = experiment.config.decode
    hotwords = ""
    if found := find_hotwords(experiment):
        warn_of_high_scores(found)
        hotwords = " ".join(f"{word.text} :{word.score:g}" for word in found)
        hotwords = hashlib.sha256(hotwords.encode()).hexdigest()
    language_model = ""
    if find_language_model(experiment) is not None:
        digest = sha256(experiment.language_model)
        language_model = f"{digest} scale {decode.language_model_scale:g}"
    for test_set, (manifest, language) in score.test_sets(experiment.config).items():
        normalize = Normalizer(language)
        made_from: dict[str, str | int] = {
            "checkpoint_sha256": checkpoint_sha256,
            "test_set_sha256": sha256(experiment.manifests_dir / manifest),
            "normalizer": normalize.version,
            "hotwords": hotwords,
            "language_model": language_model,
            "text_rules": normalize.checksum,
        }
        if decode.search == "modified_beam_search":
            made_from["beam"] = decode.beam
        cuts = _read_test_set(experiment.manifests_dir / manifest)
        yield test_set, Source(cuts, normalize, made_from)


def decode_all(experiment: Experiment) -> None:
    """Decodes every test set in every planned way.

    Raises:
        ValueError: something that an earlier stage makes is missing.
    """
    checkpoint_sha256 = checkpoint_digest(experiment)
    for test_set, (cuts, normalize, made_from) in test_sources(experiment, checkpoint_sha256):
        aligned = cache(partial(align_references, experiment, cuts, normalize))
        references = aligned if experiment.config.decode.latency else None
        for run in score.planned_runs(experiment.config):
            if run.test_set == test_set:
                decode_run(experiment, run, cuts, made_from, normalize, references)
    write_provenance(experiment, "decode", checkpoint_sha256=checkpoint_sha256)


if __name__ == "__main__":
    run_stage(__doc__, decode_all)
