"""Hours of streaming in one process: does memory stay flat, do timestamps drift, does it slow down?

    python benchmarks/bench_soak.py --hours 6 [FILE...]
    python benchmarks/bench_soak.py --bundle DIR --hours 0.5 FILE...

Through sherpa-onnx ("sherpa") and our own streams ("onnxruntime"), each section in a process of
its own:

speech     one stream that hears the recordings again and again, a pause after each
silence    one stream that nobody speaks to
crowd      a thousand short utterances at once, several times

A round of recordings and pauses is a whole number of chunks long, so each round is cut into chunks
in the same way, and its tokens should come at the same times after its beginning.  "drift" is the
slope of that: ms of the mean time of a round's tokens per hour, over the rounds that have as many
tokens as most have.  Memory is what the process holds (RSS), computing is in CPU seconds for each
hour of audio.

Without --bundle the tiny English base model is exported; without FILE a synthetic voice speaks.
Neither engine looks for endpoints here, so hypotheses grow with the stream.
"""

from __future__ import annotations

import argparse
import collections
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch

from icetransfer.data.synthetic.espeak import Espeak
from icetransfer.data.utterances import SAMPLING_RATE
from icetransfer.export import Source, export_tier
from icetransfer.model.checkpoint import load_transducer
from icetransfer.streaming.exported import Exported, write_tokens
from icetransfer.streaming.onnx_model import OnnxTransducer
from icetransfer.streaming.search import SHERPA, Hypothesis, make_search
from icetransfer.streaming.sherpa import SherpaRecognizer
from icetransfer.streaming.streams import Samples, Stream, StreamPool, tail_seconds

BASE = Path(__file__).parents[1] / "egs/base_models/en.pt"
CHUNK_SIZE, LEFT_CONTEXT_FRAMES = 16, 128
FRAME_SAMPLES = SAMPLING_RATE // 50  # of a frame at 50 Hz
FRAME_MS = 40  # of an encoder output
PAUSE = 2  # seconds, at least
PIECE = SAMPLING_RATE  # samples given at a time
CROWD, CROWDS = 1000, 4
SENTENCES = ("turn on the light in the kitchen", "set a timer for ten minutes", "play some music")
ENGINES = ("sherpa", "onnxruntime")
REPORTS = 12  # lines of a section


class OwnStream:
    """A stream of our own, with the methods of sherpa-onnx's `LiveStream`."""

    def __init__(self, pool: StreamPool) -> None:
        self._pool = pool
        (self._stream,) = pool.open()

    def accept(self, samples: Samples) -> Hypothesis:
        """Hears the next samples; the best hypothesis so far."""
        self._stream.accept(samples)
        while self._stream.ready:
            self._pool.step()
        return self._pool.results([self._stream])[0]


@dataclass(frozen=True)
class Engine:
    """A bundle, and what runs it."""

    name: str
    bundle: Path

    def load(self) -> Any:
        """The recogniser, or our pool of streams."""
        exported = Exported(self.bundle)
        facts = exported.inspect("fp32")
        if self.name == "sherpa":
            tail = tail_seconds(facts.chunk_size)
            return SherpaRecognizer(self.bundle, facts.chunk_size, tail_seconds=tail)
        model = OnnxTransducer(self.bundle)
        search = make_search("greedy_search", model, 1, SHERPA)
        return StreamPool(model, search, facts.chunk_size, facts.left_context_frames)

    def listen(self, loaded: Any) -> Any:
        """A new stream."""
        return loaded.listen() if self.name == "sherpa" else OwnStream(loaded)

    def recognise(self, loaded: Any, recordings: list[Samples]) -> list[Hypothesis]:
        """All recordings at once."""
        if self.name == "sherpa":
            found: list[Hypothesis] = loaded(recordings)
            return found
        streams: list[Stream] = loaded.open(len(recordings))
        for stream, samples in zip(streams, recordings, strict=True):
            stream.accept(samples)
            stream.finish()
        while not all(stream.ended for stream in streams):
            loaded.step()
        closed: list[Hypothesis] = loaded.close(streams)
        return closed


def resident_mb() -> float:
    """Memory that this process holds now."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmRSS:")[2].split()[0]) / 1e3


def make_round(recordings: list[Samples], chunk_size: int) -> Samples:
    """The recordings with pauses, a whole number of chunks in all."""
    pause = np.zeros(PAUSE * SAMPLING_RATE, np.float32)
    once = np.concatenate([part for samples in recordings for part in (samples, pause)])
    chunk = chunk_size * FRAME_SAMPLES
    return np.pad(once, (0, -len(once) % chunk))


def stream_for(engine: Engine, once: Samples, hours: float, title: str) -> None:
    """Streams a round again and again and prints memory, computing and drift as it goes."""
    torch.set_num_threads(1)
    stream = engine.listen(engine.load())
    rounds = max(REPORTS, round(hours * 3600 * SAMPLING_RATE / len(once)))
    reports = {round(rounds * (n + 1) / REPORTS) for n in range(REPORTS)}
    hypothesis, heard, since = Hypothesis([], []), 0, time.process_time()
    for number in range(1, rounds + 1):
        for first in range(0, len(once), PIECE):
            hypothesis = stream.accept(once[first : first + PIECE])
        if number not in reports:
            continue
        now, audio = time.process_time(), (number - heard) * len(once) / SAMPLING_RATE / 3600
        print(
            f"{title}, {engine.name}: after {number * len(once) / SAMPLING_RATE / 3600:5.2f} h "
            f"{resident_mb():7.1f} MB, {(now - since) / audio:6.1f} CPU s per hour, "
            f"{len(hypothesis.tokens)} tokens",
            flush=True,
        )
        heard, since = number, now
    print(f"{title}, {engine.name}: {drift(hypothesis, len(once), rounds)}", flush=True)


def drift(hypothesis: Hypothesis, samples: int, rounds: int) -> str:
    """How the times of tokens within a round of so many samples change from round to round."""
    frames = samples // (2 * FRAME_SAMPLES)  # encoder outputs of a round
    times = collections.defaultdict(list)
    for frame in hypothesis.timestamps:
        times[frame // frames].append(frame % frames)
    if not times:
        return "no token, so no drift"
    count = collections.Counter(map(len, times.values())).most_common(1)[0][0]
    alike = {number: found for number, found in times.items() if len(found) == count}
    means = np.array([np.mean(found) for found in alike.values()]) * FRAME_MS
    hours = np.array([*alike]) * samples / SAMPLING_RATE / 3600
    slope = np.polyfit(hours, means, 1)[0] if len(alike) > 1 else 0.0
    worst = float(np.abs(means - np.median(means)).max())
    return (
        f"{len(alike)} of {rounds} rounds have {count} tokens, drift {slope:+.3f} ms per hour, the "
        f"mean time of a round is at most {worst:.0f} ms from their median"
    )


def crowd(engine: Engine, recordings: list[Samples]) -> None:
    """Recognises a thousand short utterances at once, again and again, and prints memory."""
    torch.set_num_threads(1)
    loaded = engine.load()
    short = [samples[: 2 * SAMPLING_RATE] for samples in recordings]
    batch = [short[n % len(short)] for n in range(CROWD)]
    alone = [engine.recognise(loaded, [samples])[0].tokens for samples in short]
    print(f"crowd, {engine.name}: {resident_mb():.1f} MB before", flush=True)
    for _ in range(CROWDS):
        since = time.process_time()
        found = engine.recognise(loaded, batch)
        other = sum(h.tokens != alone[n % len(short)] for n, h in enumerate(found))
        print(
            f"crowd, {engine.name}: {CROWD} at once, {time.process_time() - since:.1f} CPU s, "
            f"{resident_mb():.1f} MB; {other} have other tokens than alone",
            flush=True,
        )


def in_process(section: Callable[..., None], *arguments: Any) -> None:
    """Runs a section in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(section, arguments)


def export_base(folder: Path) -> Path:
    """The tiny base model as a bundle; its tokens have numbers for names."""
    tokens = folder / "tokens.txt"
    model = load_transducer(BASE)
    names = ["<blk>", "<sos/eos>", "<unk>", *(f"t{n}" for n in range(3, model.vocab_size))]
    write_tokens(names, tokens)
    bundle = Exported(folder / "bundle")
    export_tier(Source.load(BASE, tokens), bundle, CHUNK_SIZE, LEFT_CONTEXT_FRAMES, ["fp32"])
    return bundle.dir


def read_or_say(files: list[Path]) -> list[Samples]:
    """The recordings, or some sentences of a synthetic voice: mono, 16 kHz."""
    if files:
        sounds = [soundfile.read(file, dtype="float32", always_2d=True) for file in files]
        return [
            soxr.resample(samples.mean(1), rate, SAMPLING_RATE).astype(np.float32)
            for samples, rate in sounds
        ]
    voice = Espeak("en", "f2")
    said = [voice.say(text, rate=170, pitch=50, pitch_range=50, seed=1) for text in SENTENCES]
    return [
        soxr.resample(samples.astype(np.float32) / 2**15, voice.sample_rate, SAMPLING_RATE)
        for samples in said
    ]


def main() -> None:
    """Runs the sections that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="recordings")
    parser.add_argument("--bundle", type=Path, help="a streaming tier that stage 8 exported")
    parser.add_argument("--hours", type=float, default=6, help="of audio, default %(default)s")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--sections", nargs="+", choices=("speech", "silence", "crowd"))
    args = parser.parse_args()
    wanted = args.sections or ("speech", "silence", "crowd")
    with tempfile.TemporaryDirectory() as folder:
        bundle = args.bundle or export_base(Path(folder))
        recordings = read_or_say(args.files)
        once = make_round(recordings, Exported(bundle).inspect("fp32").chunk_size)
        for name in args.engines:
            engine = Engine(name, bundle)
            if "speech" in wanted:
                in_process(stream_for, engine, once, args.hours, "speech")
            if "silence" in wanted:
                in_process(stream_for, engine, np.zeros_like(once), args.hours, "silence")
            if "crowd" in wanted:
                in_process(crowd, engine, recordings)


if __name__ == "__main__":
    main()
