"""Long recordings through a bundle, as icetransfer.transcribe hears them.

    python benchmarks/bench_transcribe.py --bundle egs/it/exp/NAME/bundle FILE...

long       hours of the recordings again and again, pauses between them: memory and CPU seconds for
           each hour, at a streaming tier and at the tier with full context
nobody     words a minute on an hour of silence, noise and music each: without endpoints, with
           them, and with the least confidence besides; and the same on half an hour of the
           recordings
cut        half an hour of the recordings at the tier with full context, whose words are compared
           with those of each recording alone, as it is and with silence around it

The FILEs are test recordings of the model's language.  Noise is white, pink and brown at changing
levels, half of it swelling, some of it with knocks; music is chords, a tune, a bass and drums, made
here.  Each section runs in a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kaldialign
import numpy as np
import soundfile

from icetransfer.bundle.settings import read_settings
from icetransfer.data.utterances import SAMPLING_RATE
from icetransfer.streaming.exported import Exported, read_tokens
from icetransfer.streaming.segments import (
    MARGIN,
    Listener,
    OfflineListener,
    StreamingListener,
    make_words,
)
from icetransfer.streaming.sherpa import SherpaRecognizer
from icetransfer.streaming.streams import Samples, tail_seconds

MINUTE = 60 * SAMPLING_RATE
PAUSES = (0.8, 2.5)  # seconds between recordings


def resident_mb() -> float:
    """Memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def listener(tier: Path, least: float | None = None, **options: Any) -> Listener:
    """Begins a recording, with the bundle's rules unless `options` say otherwise."""
    bundle, settings = Exported(tier), read_settings(tier)
    size = bundle.inspect("fp32").chunk_size
    if size != -1:
        options = settings.rules | {"enable_endpoint_detection": True} | options
    tail = tail_seconds(size)
    recognizer = SherpaRecognizer(tier, size, tail_seconds=tail, options=options)
    kind = OfflineListener if size == -1 else StreamingListener
    least = settings.min_confidence if least is None else least
    return kind(recognizer, read_tokens(bundle.tokens), settings.pause, least)


def words(heard: Listener, pieces: Iterator[Samples]) -> Iterator[list[str]]:
    """The words of each piece's segments, and of the last ones."""
    for samples in pieces:
        yield [word.text for segment in heard.accept(samples) for word in segment.words]
    yield [word.text for segment in heard.finish() for word in segment.words]


def speech(files: list[Path], minutes: float) -> Iterator[Samples]:
    """The recordings again and again, a pause after each, for about so many minutes."""
    rng = np.random.default_rng(1)
    recordings = [soundfile.read(file, dtype="float32")[0] for file in files]
    given, number = 0, 0
    while given < minutes * MINUTE:
        pause = np.zeros(int(rng.uniform(*PAUSES) * SAMPLING_RATE), dtype=np.float32)
        piece = np.concatenate([recordings[number % len(recordings)], pause])
        given, number = given + len(piece), number + 1
        yield piece


def silence(minutes: float) -> Iterator[Samples]:
    """Zeros."""
    for _ in range(int(minutes)):
        yield np.zeros(MINUTE, dtype=np.float32)


def noise(minutes: float) -> Iterator[Samples]:
    """Ten seconds each of a colour and a level."""
    rng = np.random.default_rng(2)
    count = 10 * SAMPLING_RATE
    seconds = np.arange(count) / SAMPLING_RATE
    frequencies = np.fft.rfftfreq(count, 1 / SAMPLING_RATE)
    frequencies[0] = frequencies[1]
    for _ in range(int(6 * minutes)):
        spectrum = np.fft.rfft(rng.standard_normal(count))
        samples = np.fft.irfft(spectrum * frequencies ** (rng.choice([0, -1, -2]) / 2), count)
        samples *= 10 ** (rng.uniform(-60, -15) / 20) / samples.std()
        if rng.random() < 0.5:
            samples *= 1 + 0.8 * np.sin(2 * np.pi * rng.uniform(0.1, 3) * seconds)
        if rng.random() < 0.3:
            knock = np.exp(-np.arange(2000) / 200) * rng.standard_normal(2000) * samples.std()
            for place in rng.integers(0, count - 2000, 20):
                samples[place : place + 2000] += rng.uniform(1, 8) * knock
        yield np.clip(samples, -1, 1).astype(np.float32)


def tone(frequency: float, seconds: float, dark: float) -> np.ndarray:
    """A plucked tone with harmonics and a little vibrato."""
    times = np.arange(int(seconds * SAMPLING_RATE)) / SAMPLING_RATE
    envelope = np.minimum(times / 0.01, 1) * np.exp(-1.5 * times / seconds)
    phase = 2 * np.pi * frequency * times * (1 + 0.004 * np.sin(10 * np.pi * times))
    harmonics = [k for k in range(1, 9) if k * frequency < 7500]
    return envelope * sum(np.sin(k * phase) / k**dark for k in harmonics)


def music(minutes: float) -> Iterator[Samples]:
    """A minute each at a tempo of its own."""
    rng = np.random.default_rng(3)
    chords = ((0, 4, 7), (9, 12, 16), (5, 9, 12), (7, 11, 14))
    drum_times = np.arange(3000) / SAMPLING_RATE
    for _ in range(int(minutes)):
        beat = 60 / rng.uniform(80, 140)
        samples = np.zeros(MINUTE + 4 * SAMPLING_RATE)

        def add(sound: np.ndarray, level: float, place: int, to: np.ndarray = samples) -> None:
            to[place : place + len(sound)] += level * sound

        for number in range(int(60 / beat)):
            place, chord = int(number * beat * SAMPLING_RATE), chords[number // 4 % 4]
            if number % 2 == 0:
                for step in chord:
                    add(tone(220 * 2 ** (step / 12), 2 * beat, 1.5), 0.15, place)
                drum = np.exp(-30 * drum_times) * np.sin(120 * np.pi * drum_times)
            else:
                drum = 0.6 * np.exp(-40 * drum_times) * rng.standard_normal(len(drum_times))
            step = chord[rng.integers(3)] + 12
            add(tone(220 * 2 ** (step / 12), beat * rng.choice([0.5, 1, 1]), 1.0), 0.3, place)
            add(tone(55 * 2 ** (chord[0] / 12), beat, 2), 0.4, place)
            add(drum, 0.5, place)
        yield (0.3 * samples[:MINUTE] / np.abs(samples).max()).astype(np.float32)


def run_long(tier: Path, files: list[Path], hours: float) -> None:
    """Memory and CPU seconds after each hour."""
    heard, seconds, count, hour = listener(tier), 0.0, 0, 1
    print(f"long, {tier.name}: {resident_mb():.1f} MB before", flush=True)
    since = time.process_time()
    for samples in speech(files, 60 * hours):
        count += sum(len(segment.words) for segment in heard.accept(samples))
        seconds += len(samples) / SAMPLING_RATE
        if seconds >= 3600 * hour:
            spent, since = time.process_time() - since, time.process_time()
            print(
                f"long, {tier.name}: hour {hour}, {resident_mb():.1f} MB, {spent:.1f} CPU s, "
                f"{count} words so far",
                flush=True,
            )
            hour += 1


def run_nobody(tier: Path, files: list[Path], minutes: float) -> None:
    """Words a minute without endpoints, with them, and with the least confidence besides."""
    least = read_settings(tier).min_confidence
    sounds: dict[str, Callable[[], Iterator[Samples]]] = {
        "noise": lambda: noise(minutes),
        "music": lambda: music(minutes),
        "speech": lambda: speech(files, min(minutes, 30)),
        "silence": lambda: silence(minutes),
    }
    ways: dict[str, dict[str, Any]] = {"endpoints": {}}
    if tier.name != "offline":
        ways = {"no endpoints": {"enable_endpoint_detection": False}} | ways
    for name, make in sounds.items():
        for way, options in ways.items():
            heard, length, found = listener(tier, 0.0, **options), 0, []
            for samples in make():
                length += len(samples)
                found += heard.accept(samples)
            found += heard.finish()
            counts = {way: sum(len(segment.words) for segment in found)}
            if way == "endpoints":
                sure = [segment for segment in found if segment.confidence >= least]
                counts["and least confidence"] = sum(len(segment.words) for segment in sure)
            for what, count in counts.items():
                rate = count * MINUTE / length
                print(f"nobody, {tier.name}, {name}, {what}: {rate:.2f} words a minute", flush=True)


def run_cut(tier: Path, files: list[Path], minutes: float) -> None:
    """Words in which a recording that is cut at pauses differs from its utterances alone."""
    bundle, settings = Exported(tier), read_settings(tier)
    recognizer = SherpaRecognizer(tier, -1, tail_seconds=tail_seconds(-1))

    names = read_tokens(bundle.tokens)
    around = np.zeros(int(MARGIN * SAMPLING_RATE), dtype=np.float32)

    def whole(samples: Samples) -> list[str]:
        (utterance,) = recognizer.utterances([samples])
        return [word.text for word in make_words(utterance, names)]

    def cut(pieces: list[Samples]) -> list[str]:
        heard = OfflineListener(recognizer, names, settings.pause, 0.0)
        return [word for found in words(heard, iter(pieces)) for word in found]

    pieces = [*speech(files, minutes)]
    alone = [soundfile.read(files[n % len(files)], dtype="float32")[0] for n in range(len(pieces))]
    found = cut(pieces)
    bare = [word for samples in alone for word in whole(samples)]
    print(f"cut, {minutes:g} minutes, from each alone: {differences(bare, found)}")
    padded = [word for s in alone for word in whole(np.concatenate([around, s, around]))]
    print(f"cut, from each alone in {MARGIN:g} s of silence: {differences(padded, found)}")
    print(f"cut, these two from each other: {differences(bare, padded)}", flush=True)


def differences(reference: list[str], found: list[str]) -> str:
    """How many words of one differ from the other."""
    errors = kaldialign.edit_distance(reference, found)["total"]
    return f"{errors} of {len(reference)} words differ ({100 * errors / len(reference):.2f} %)"


def in_process(section: Callable[..., None], *arguments: Any) -> None:
    """Runs a section in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(section, arguments)


def main() -> None:
    """Runs the sections that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="recordings at 16 kHz")
    parser.add_argument("--bundle", type=Path, required=True, help="a folder of tiers")
    parser.add_argument("--hours", type=float, default=6, help="of long, default %(default)s")
    parser.add_argument("--minutes", type=float, default=60, help="of nobody, default %(default)s")
    parser.add_argument("--sections", nargs="+", choices=("long", "nobody", "cut"))
    args = parser.parse_args()
    wanted = args.sections or ("long", "nobody", "cut")
    streaming, offline = args.bundle / "chunk-16-left-128", args.bundle / "offline"
    if "cut" in wanted:
        in_process(run_cut, offline, args.files, 30)
    if "nobody" in wanted:
        in_process(run_nobody, streaming, args.files, args.minutes)
        in_process(run_nobody, offline, args.files, args.minutes)
    if "long" in wanted:
        in_process(run_long, streaming, args.files, args.hours)
        in_process(run_long, offline, args.files, args.hours)


if __name__ == "__main__":
    main()
