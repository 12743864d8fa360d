"""A synthetic speech corpus that any machine can make offline.

espeak-ng reads sentences of `sentences.py` with many voices; rate, pitch, reverberation, level and
noise vary. The corpus grows chunk by chunk: a chunk is a few sentences of one split in one voice,
made by a process of its own (espeak-ng's audio depends on all that it said before), written to a
temporary name and renamed. So the bytes depend on the request only, whatever the number of
processes; a killed run continues; a longer corpus contains the shorter one.

    out_dir/corpus.json                          what this folder holds
    out_dir/audio/<split>/<chunk>/*.flac         16 kHz mono
    out_dir/audio/<split>/<chunk>/utterances.jsonl
    out_dir/<split>_recordings.jsonl.gz          lhotse manifests
    out_dir/<split>_supervisions.jsonl.gz        text normalised, speaker = voice
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from icetransfer.data.jsonl import write_jsonl_gz
from icetransfer.data.synthetic import espeak
from icetransfer.data.synthetic.sentences import (
    DOMAINS,
    Sentence,
    SentenceSource,
    read_grammar,
)
from icetransfer.data.text.normalizer import Normalizer
from icetransfer.data.utterances import SAMPLING_RATE, SPLITS
from icetransfer.stage.atomic import write_text
from icetransfer.stage.json_file import read_json
from icetransfer.stage.parent import work_for_parent
from icetransfer.stage.progress import minutes_of, progress_bar

if TYPE_CHECKING:
    from multiprocessing.context import ForkProcess

#: Raised whenever the same request gives other bytes than before.
VERSION = 1

SENTENCES_PER_CHUNK = 6
_CHUNKS_AT_A_TIME = 4
_SPARE_SENTENCES = 2 * _CHUNKS_AT_A_TIME * SENTENCES_PER_CHUNK

#: The intelligible variants (no whispering, croaking or robots); near relatives share a split.
VOICES: Mapping[str, tuple[str, ...]] = {
    "train": (
        "m1", "m3", "m4", "m7", "Alex", "Diogo", "michel", "Mario", "Andy", "Gene", "robert",
        "edward2", "f1", "f2", "f4", "linda", "Annie", "steph",
    ),
    "dev": ("m2", "quincy", "f3", "Andrea", "marcelo"),
    "test": ("m6", "gustave", "pablo", "Nguyen", "f5", "belinda"),
}  # fmt: skip

_RATE = (135, 195)  # words per minute
_PITCH = (35, 65)  # espeak-ng's scale, the voice's own at 50
_PITCH_RANGE = (30, 70)
_LEVEL_DB = (-32.0, -18.0)  # RMS of the speech, against full scale
_SNR_DB = (15.0, 40.0)
_NOISE_SLOPE = (0.0, 2.0)  # power falls as 1/f^slope: white to brown
_REVERBERANT = 0.25  # share of the utterances
_DECAY_SECONDS = (0.1, 0.4)  # time in which the reverberation falls by 60 dB
_DIRECT_TO_REVERBERANT_DB = (3.0, 15.0)
_EDGE_SECONDS = (0.1, 0.3)  # silence before and after the speech
_SHORTEST_SENTENCE_SECONDS = 2.0  # how many sentences are drawn before their audio is made

_fork = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class _Chunk:
    """A few sentences of one split in one voice."""

    language: str
    domain: str
    split: str
    index: int
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.language}-{self.domain}-{self.split}-{self.index:05d}"

    @property
    def variant(self) -> str:
        """The voices in turn, in a new order each round."""
        voices = sorted(VOICES[self.split])
        order = _generator(
            self.language, self.domain, self.split, self.seed, self.index // len(voices)
        )
        return voices[int(order.permutation(len(voices))[self.index % len(voices)])]

    def utterances(self) -> list[dict[str, Any]] | None:
        """Returns what the finished chunk holds; None when it is not finished."""
        path = self.folder / "utterances.jsonl"
        if not path.exists():
            return None
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def synthesise(
    language: str,
    domain: str,
    minutes: Mapping[str, float],
    out_dir: Path,
    *,
    seed: int = 0,
    jobs: int = 2,
) -> None:
    """Makes a corpus, or as much of it as is missing.

    Args:
        language: Code of a language with a grammar.
        domain: "slots" (a closed domain of 200 to 400 words) or "open".
        minutes: Speech wanted in each split; "train", "dev", "test".
        out_dir: Where to write it.
        seed: The same seed gives the same bytes.
        jobs: Number of processes.

    Raises:
        ValueError: Unknown language, domain or split, or the folder holds another corpus.
        RuntimeError: A process failed; its own message is on stderr.
    """
    SentenceSource(language, domain)  # its errors come before any work
    unknown = sorted(set(minutes) - set(SPLITS))
    if unknown:
        raise ValueError(f"no split named {unknown[0]!r}; expected {', '.join(SPLITS)}")
    if espeak.is_loaded():
        # Its history would be inherited by every forked process.
        raise RuntimeError("synthesise must run in a process where espeak-ng has not been used")
    out_dir.mkdir(parents=True, exist_ok=True)
    _claim(out_dir, language, domain, seed)
    most = {
        split: math.ceil(60.0 * wanted / _SHORTEST_SENTENCE_SECONDS) + _SPARE_SENTENCES
        for split, wanted in minutes.items()
    }

    @cache
    def sentences() -> Mapping[str, list[Sentence]]:  # not called when all audio is there
        return draw_sentences(language, domain, most, seed)

    for split, wanted in minutes.items():
        first = _Chunk(language, domain, split, 0, seed, out_dir / "audio" / split / "00000")
        utterances = _make_split(first, 60.0 * wanted, sentences, jobs)
        _write_manifests(utterances, split, out_dir)


def _claim(out_dir: Path, language: str, domain: str, seed: int) -> None:
    """Records what the folder holds; refuses to mix two corpora."""
    others = {name for name in DOMAINS if name != domain}
    grammar = {key: value for key, value in read_grammar(language).items() if key not in others}
    corpus = {
        "version": VERSION,
        "language": language,
        "domain": domain,
        "seed": seed,
        "text": Normalizer(language).words_version,
        "grammar_sha256": hashlib.sha256(json.dumps(grammar).encode()).hexdigest(),
    }
    path = out_dir / "corpus.json"
    if not path.exists():
        write_text(path, json.dumps(corpus, indent=1) + "\n")
    elif (found := read_json(path)) != corpus:
        differing = [key for key in corpus if found.get(key) != corpus[key]]
        raise ValueError(
            f"{out_dir} holds another synthetic corpus (different {', '.join(differing)}); "
            "delete that folder or choose another"
        )


def _make_split(
    first: _Chunk, seconds: float, sentences: Callable[[], Mapping[str, list[Sentence]]], jobs: int
) -> list[dict[str, Any]]:
    """Makes one split's audio; returns its utterances, just as many as fill the time."""
    folder = first.folder.parent
    folder.mkdir(parents=True, exist_ok=True)
    utterances: list[dict[str, Any]] = []
    chunks = 0
    title = f"synthesise {first.language} {first.domain} {first.split}"
    # No thread may run while processes are forked.
    with progress_bar(minutes_of(), by_hand=True) as progress:
        bar = progress.add_task(title, total=seconds / 60)

        def show(made: float) -> None:
            progress.update(bar, completed=made / 60, refresh=True)

        while (made := _seconds(utterances)) < seconds:
            show(made)
            # As many chunks as surely fit, then a few at a time until it is enough.
            mean = made / chunks if chunks else 10.0 * SENTENCES_PER_CHUNK
            count = max(_CHUNKS_AT_A_TIME, math.floor((seconds - made) / mean))
            wave = [
                dataclasses.replace(first, index=index, folder=folder / f"{index:05d}")
                for index in range(chunks, chunks + count)
            ]
            if any(chunk.utterances() is None for chunk in wave):
                report = functools.partial(lambda so_far, new: show(so_far + new), made)
                _make_chunks(wave, sentences()[first.split], jobs, report)
            utterances += [utterance for chunk in wave for utterance in chunk.utterances() or []]
            chunks += count
        show(seconds)
    for left_over in folder.glob("*.tmp-*"):  # of a killed run
        shutil.rmtree(left_over, ignore_errors=True)
    while _seconds(utterances[:-1]) >= seconds:
        utterances.pop()
    return utterances


def _seconds(utterances: Sequence[Mapping[str, Any]]) -> float:
    return float(sum(utterance["samples"] for utterance in utterances)) / SAMPLING_RATE


def _make_chunks(
    chunks: Sequence[_Chunk],
    sentences: Sequence[Sentence],
    jobs: int,
    show: Callable[[float], None],
) -> None:
    """Makes the chunks that are missing, each in a fresh process, `jobs` at a time."""
    missing = [chunk for chunk in chunks if chunk.utterances() is None]
    running: dict[int, tuple[ForkProcess, _Chunk]] = {}
    made = sum(_seconds(chunk.utterances() or []) for chunk in chunks)
    try:
        while missing or running:
            while missing and len(running) < jobs:
                chunk = missing.pop(0)
                start = chunk.index * SENTENCES_PER_CHUNK
                part = sentences[start : start + SENTENCES_PER_CHUNK]
                process = _fork.Process(target=_make_chunk, args=(chunk, part))
                process.start()
                running[process.sentinel] = (process, chunk)
            for sentinel in multiprocessing.connection.wait(list(running)):
                process, chunk = running.pop(sentinel)  # type: ignore[arg-type]
                process.join()
                finished = chunk.utterances()
                if process.exitcode != 0 or finished is None:
                    raise RuntimeError(f"synthesis of {chunk.name} failed: see the message above")
                made += _seconds(finished)
                show(made)
    finally:
        for process, _ in running.values():
            process.terminate()


def _make_chunk(chunk: _Chunk, sentences: Sequence[Sentence]) -> None:
    """Speak, degrade and write a chunk's sentences; runs in a process of its own."""
    work_for_parent()
    temporary = chunk.folder.with_name(f"{chunk.folder.name}.tmp-{os.getpid()}")
    temporary.mkdir()
    voice = espeak.Espeak(read_grammar(chunk.language)["espeak"], chunk.variant)
    lines = []
    for number, sentence in enumerate(sentences):
        generator = _generator(chunk.name, chunk.seed, number)
        samples = _degrade(_speak(voice, sentence.spoken, generator), generator)
        name = f"{chunk.name}-{number}"
        soundfile.write(temporary / f"{name}.flac", samples, SAMPLING_RATE, subtype="PCM_16")
        utterance = {
            "id": name,
            "samples": len(samples),
            "speaker": f"{chunk.language}-{chunk.variant}",
            "text": sentence.text,
            "spoken": sentence.spoken,
        }
        lines.append(json.dumps(utterance, ensure_ascii=False) + "\n")
    (temporary / "utterances.jsonl").write_text("".join(lines), encoding="utf-8")
    try:
        temporary.rename(chunk.folder)
    except OSError:
        # A process that outlived a killed run may have been first; it wrote the same bytes.
        if chunk.utterances() is None:
            raise


def _speak(
    voice: espeak.Espeak, sentence: str, generator: np.random.Generator
) -> NDArray[np.float32]:
    """Returns a sentence at 16 kHz, with a random rate and pitch and a little silence around."""
    said = voice.say(
        sentence,
        rate=int(generator.integers(*_RATE)),
        pitch=int(generator.integers(*_PITCH)),
        pitch_range=int(generator.integers(*_PITCH_RANGE)),
        seed=int(generator.integers(2**31)),
    )
    samples = soxr.resample(said.astype(np.float32) / 2**15, voice.sample_rate, SAMPLING_RATE)
    loud = np.flatnonzero(np.abs(samples) > 0.003 * np.abs(samples).max(initial=0.0))
    if len(loud) == 0:
        raise RuntimeError(f"espeak-ng said nothing for {sentence!r}")
    before, after = (int(SAMPLING_RATE * s) for s in generator.uniform(*_EDGE_SECONDS, size=2))
    return np.pad(samples[loud[0] : loud[-1] + 1], (before, after))


def _degrade(speech: NDArray[np.float32], generator: np.random.Generator) -> NDArray[np.float32]:
    """Returns the speech with reverberation (some of the time), a random level and noise."""
    if generator.random() < _REVERBERANT:
        speech = _reverberate(speech, generator)
    level = 10 ** (generator.uniform(*_LEVEL_DB) / 20)
    speech = speech * np.float32(level / _rms(speech))
    noise = _coloured_noise(len(speech), generator.uniform(*_NOISE_SLOPE), generator)
    speech += noise * np.float32(level * 10 ** (-generator.uniform(*_SNR_DB) / 20))
    return np.asarray(speech * np.float32(min(1.0, 0.98 / np.abs(speech).max())))


def _reverberate(
    speech: NDArray[np.float32], generator: np.random.Generator
) -> NDArray[np.float32]:
    """Convolves with exponentially decaying noise, the usual model of a diffuse room."""
    decay = generator.uniform(*_DECAY_SECONDS)
    times = np.arange(int(decay * SAMPLING_RATE), dtype=np.float32) / SAMPLING_RATE
    tail = generator.standard_normal(len(times), np.float32) * 10 ** (
        -3 * times / np.float32(decay)
    )
    ratio = 10 ** (generator.uniform(*_DIRECT_TO_REVERBERANT_DB) / 20)
    response = tail / np.float32(ratio * np.sqrt(np.sum(tail**2)))
    response[0] = 1.0
    size = _fast_size(len(speech) + len(response))
    spectrum = np.fft.rfft(speech, size) * np.fft.rfft(response, size)
    return np.asarray(np.fft.irfft(spectrum, size)[: len(speech)])


def _coloured_noise(
    length: int, slope: float, generator: np.random.Generator
) -> NDArray[np.float32]:
    """Returns noise of RMS 1 whose power falls as 1/f^slope above 50 Hz."""
    size = _fast_size(length)
    frequencies = np.arange(size // 2 + 1, dtype=np.float32) * np.float32(SAMPLING_RATE / size)
    gains = np.maximum(frequencies, np.float32(50.0)) ** np.float32(-slope / 2)
    spectrum = np.fft.rfft(generator.standard_normal(size, np.float32)) * gains
    noise = np.fft.irfft(spectrum, size)[:length].astype(np.float32)
    return np.asarray(noise / _rms(noise))


def _fast_size(length: int) -> int:
    """Returns a length that has small prime factors only, for the Fourier transform."""
    step = 1 << max(0, length.bit_length() - 3)
    return -(-length // step) * step


def _rms(samples: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean(np.square(samples))))


def _generator(*request: object) -> np.random.Generator:
    """Returns a generator that depends on the request only."""
    digest = hashlib.sha256(" ".join(map(str, request)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def draw_sentences(
    language: str, domain: str, counts: Mapping[str, int], seed: int
) -> dict[str, list[Sentence]]:
    """Returns the first sentences of each split, without those that espeak-ng reads as foreign.

    They are drawn in a process of their own, which leaves this one free of espeak-ng.

    Args:
        language: Code of a language with a grammar.
        domain: "slots" or "open".
        counts: How many sentences of each split.
        seed: The same seed gives the same sentences.

    Raises:
        ValueError: The grammar is wrong, or too small for so many sentences.
    """
    receiver, sender = _fork.Pipe(duplex=False)
    process = _fork.Process(target=_draw, args=(language, domain, counts, seed, sender))
    process.start()
    sender.close()
    try:
        drawn: dict[str, list[Sentence]] | ValueError = receiver.recv()
    except EOFError:
        raise RuntimeError("drawing sentences failed: see the message above") from None
    finally:
        process.join()
    if isinstance(drawn, ValueError):
        raise drawn
    return drawn


def _draw(
    language: str, domain: str, counts: Mapping[str, int], seed: int, sender: Connection
) -> None:
    """Sends the first sentences of each split, or why there are none."""
    work_for_parent()
    try:
        voice = espeak.Espeak(read_grammar(language)["espeak"])
        source = SentenceSource(language, domain, voice.reads_as_foreign)
        sender.send(
            {s: list(itertools.islice(source.sentences(s, seed), n)) for s, n in counts.items()}
        )
    except ValueError as error:
        sender.send(error)


def _write_manifests(utterances: Sequence[Mapping[str, Any]], split: str, out_dir: Path) -> None:
    """Writes lhotse's `<split>_recordings.jsonl.gz` and `<split>_supervisions.jsonl.gz`."""
    recordings, supervisions = [], []
    for utterance in utterances:
        name, samples = utterance["id"], utterance["samples"]
        language, *_, chunk, _ = name.split("-")
        path = out_dir / "audio" / split / chunk / f"{name}.flac"
        seconds = samples / SAMPLING_RATE
        recordings.append(
            {
                "id": name,
                "sources": [{"type": "file", "channels": [0], "source": str(path)}],
                "sampling_rate": SAMPLING_RATE,
                "num_samples": samples,
                "duration": seconds,
                "channel_ids": [0],
            }
        )
        supervisions.append(
            {
                "id": name,
                "recording_id": name,
                "start": 0.0,
                "duration": seconds,
                "channel": 0,
                "text": utterance["text"],
                "language": language,
                "speaker": utterance["speaker"],
                "custom": {"raw_text": utterance["spoken"]},
            }
        )
    write_jsonl_gz(out_dir / f"{split}_recordings.jsonl.gz", recordings)
    write_jsonl_gz(out_dir / f"{split}_supervisions.jsonl.gz", supervisions)
