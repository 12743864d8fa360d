"""What a bundle hears in sound files or at the microphone, as it hears it.

    python tools/transcribe.py --bundle egs/nl/exp/NAME/onnx --latency 320 FILE...
    python tools/transcribe.py --bundle .../onnx/chunk-16-left-128 --precision int8 - < a.wav
    python tools/transcribe.py --bundle DIR --microphone

A bundle is a folder that `python -m icetransfer.export` or stage 8 makes, or one with several
tiers, from which --latency chooses.  WAV, FLAC, MP3 and what else libsndfile reads, at any sampling
rate; channels are mixed.  sherpa-onnx is given 0.1 s at a time, and every change of its hypothesis
is printed after the seconds of audio that it had heard by then; last, each word with the time of
its first token.  An offline bundle says it all at the end.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
from lhotse.augmentation import Resample
from lhotse.utils import compute_num_samples
from numpy.typing import NDArray

from icetransfer.config import chunk_label, chunk_ms
from icetransfer.data.utterances import SAMPLING_RATE
from icetransfer.experiment import main
from icetransfer.streaming.alignment import OUTPUT_SECONDS, spoken_words
from icetransfer.streaming.exported import Exported, read_tokens
from icetransfer.streaming.onnx_model import OnnxTransducer
from icetransfer.streaming.search import Hypothesis
from icetransfer.streaming.sherpa import SherpaRecognizer
from icetransfer.streaming.streams import tail_seconds

PIECE = SAMPLING_RATE // 10  # samples given at a time
STANDARD_INPUT = "-"


def find_tier(folder: Path, latency: str | None, precision: str) -> tuple[Exported, int]:
    """The bundle that a folder is, or the one of its tiers with that latency.

    Args:
        folder: a bundle, or a folder of bundles.
        latency: the chunk in milliseconds, or "offline"; None where there is one tier only.
        precision: which must be there.

    Returns:
        The bundle and its chunk size, -1 for offline.

    Raises:
        ValueError: there is no such bundle.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder; expected what stage 8 exports, or a bundle of stage 11"
        )
    bundles = [Exported(folder), *map(Exported, sorted(p for p in folder.iterdir() if p.is_dir()))]
    bundles = [bundle for bundle in bundles if bundle.tokens.is_file()]
    tiers = {}
    for bundle in bundles:
        size = OnnxTransducer(bundle.dir, precision).chunk_size
        tiers["offline" if size == -1 else str(chunk_ms(size))] = (bundle, size)
    if not tiers:
        raise ValueError(
            f"{folder} is not a bundle and holds none, there is no tokens.txt; expected what "
            f"stage 8 exports"
        )
    if latency is None and len(tiers) == 1:
        return next(iter(tiers.values()))
    if latency not in tiers:
        asked = "choose one with --latency" if latency is None else f"not --latency {latency}"
        labels = ", ".join(sorted(tiers, key=lambda label: (len(label), label)))
        raise ValueError(f"{folder} has the latencies {labels}; {asked}")
    return tiers[latency]


def read_audio(file: str) -> NDArray[np.float32]:
    """Reads a sound file as stage 9 does: resampled in one piece; its channels are mixed.

    Args:
        file: a path, or "-" for standard input.

    Returns:
        Mono samples in [-1, 1] at 16 kHz.

    Raises:
        ValueError: the file is missing, empty, or not audio.
    """
    source: str | io.BytesIO = file
    if file == STANDARD_INPUT:
        source = io.BytesIO(sys.stdin.buffer.read())
    elif not Path(file).is_file():
        raise ValueError(f"{file} does not exist")
    try:
        samples, rate = soundfile.read(source, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise ValueError(f"{file} cannot be read as audio: {error}") from None
    if len(samples) == 0 or not np.isfinite(samples).all():
        raise ValueError(f"{file}: the audio is empty or holds samples that are not numbers")
    mono = samples.mean(axis=1)[None]
    resampled: NDArray[np.float32] = Resample(rate, SAMPLING_RATE)(mono)[0]
    return resampled[: compute_num_samples(len(samples) / rate, SAMPLING_RATE)]  # not one more


def pieces(samples: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """A recording, a tenth of a second at a time."""
    for start in range(0, len(samples), PIECE):
        yield samples[start : start + PIECE]


def microphone() -> Iterator[NDArray[np.float32]]:
    """What the default microphone hears, until Ctrl-C.

    Raises:
        ValueError: sounddevice is not installed, or there is no microphone for it.
    """
    try:
        import sounddevice
    except (ImportError, OSError) as error:  # OSError: PortAudio is missing
        raise ValueError(
            f"--microphone needs the Python package sounddevice and PortAudio ({error}): "
            f"pip install sounddevice, on Linux also the system's libportaudio2"
        ) from None
    try:
        with sounddevice.InputStream(
            samplerate=SAMPLING_RATE, channels=1, dtype="float32", blocksize=PIECE
        ) as stream:
            while True:
                samples, _ = stream.read(PIECE)
                yield samples[:, 0]
    except KeyboardInterrupt:
        return
    except sounddevice.PortAudioError as error:
        raise ValueError(f"no microphone at {SAMPLING_RATE} Hz: {error}") from None


class Printer:
    """Prints hypotheses of one recording as they change."""

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._text = ""

    def partial(self, heard: float, hypothesis: Hypothesis) -> None:
        """Prints a hypothesis unless it is the last one still; `heard` in seconds."""
        text = self._join(hypothesis)
        if text != self._text:
            print(f"{heard:8.1f} s  {text}", flush=True)
            self._text = text

    def final(self, hypothesis: Hypothesis) -> None:
        """Prints the last hypothesis, and its words with their times."""
        print(f"   final:   {self._join(hypothesis)}")
        for word in spoken_words(hypothesis, self._names):
            print(f"{word.first * OUTPUT_SECONDS:12.2f}  {word.text}")
        print(flush=True)

    def _join(self, hypothesis: Hypothesis) -> str:
        return " ".join(word.text for word in spoken_words(hypothesis, self._names))


def transcribe(
    recognizer: SherpaRecognizer, printer: Printer, audio: Iterator[NDArray[np.float32]]
) -> None:
    """Prints what a streaming bundle makes of a recording, piece by piece."""
    stream = recognizer.listen()
    heard = 0
    for samples in audio:
        heard += len(samples)
        printer.partial(heard / SAMPLING_RATE, stream.accept(samples))
    printer.final(stream.finish())


def _run(args: argparse.Namespace) -> None:
    bundle, chunk_size = find_tier(args.bundle, args.latency, args.precision)
    names = read_tokens(bundle.tokens)
    recognizer = SherpaRecognizer(
        bundle.dir, chunk_size, args.precision, tail_seconds=tail_seconds(chunk_size)
    )
    print(f"{bundle.dir}: {args.precision}, {chunk_label(chunk_size)}\n")
    if args.microphone:
        if chunk_size == -1:
            raise ValueError(f"{bundle.dir} is offline: choose a streaming tier for a microphone")
        print("microphone, end with Ctrl-C")
        transcribe(recognizer, Printer(names), microphone())
    problems = []
    for file in args.files:
        try:
            samples = read_audio(file)
        except ValueError as error:  # the other files are done all the same
            problems.append(str(error))
            continue
        print(f"{file} ({len(samples) / SAMPLING_RATE:.2f} s)")
        if chunk_size == -1:
            Printer(names).final(recognizer([samples])[0])
        else:
            transcribe(recognizer, Printer(names), pieces(samples))
    if problems:
        raise ValueError("\n".join(problems))


def _main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help="sound file, - for standard input")
    parser.add_argument("--bundle", type=Path, required=True, help="folder, or folder of tiers")
    parser.add_argument("--latency", metavar="MS|offline", help="which tier: 160, 320, ...")
    parser.add_argument("--precision", default="fp32", help="fp32, int8, ... (%(default)s)")
    parser.add_argument("--microphone", action="store_true", help="listen until Ctrl-C")
    args = parser.parse_args()
    if not args.files and not args.microphone:
        parser.error("give sound files, - for standard input, or --microphone")
    main(lambda: _run(args))


if __name__ == "__main__":
    _main()
