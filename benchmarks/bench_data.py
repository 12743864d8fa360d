"""What the data side costs at full scale; each section in a process of its own, for its memory.

    python benchmarks/bench_data.py [text] [fbank] [loader]

text        sentences per second of the normaliser, words alone and with numbers, by language
fbank       hours of audio per CPU hour of stage 2's extraction, beside lhotse's default extractor
loader      batches per second, stored features and on the fly, and memory at two sizes of corpus

Everything is made up in a temporary folder (--folder chooses its place) and removed.
What the stages cost with millions of cuts is in bench_stages.py.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from bench_loader import bench_loader
from lhotse import CutSet, Fbank, MonoCut, NumpyFilesWriter, Recording

from icetransfer import config
from icetransfer.data import features
from icetransfer.data.text.normalizer import Normalizer

TABLES = Path(__file__).parents[1] / "tests/unit/data/text"
REPEATS = 5  # of which the fastest counts


def peak_gb() -> float:
    """The most memory that this process has had, in GB.

    Not getrusage's: that begins with what the parent had.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1e6


def in_process(section: Callable[..., str], *arguments: Any) -> tuple[str, float]:
    """Runs a section in a fresh process; returns what it says and its peak memory in GB."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (section, arguments))


def _measured(section: Callable[..., str], arguments: tuple[Any, ...]) -> tuple[str, float]:
    torch.set_num_threads(1)
    return section(*arguments), peak_gb()


def made_up_speech(folder: Path, minutes: float) -> CutSet:
    """Noise with the rhythm of syllables, 16 kHz FLAC, 2 to 16 seconds each."""
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True)
    cuts: list[MonoCut] = []
    while sum(cut.duration for cut in cuts) < 60 * minutes:
        samples = int(rng.integers(2 * 16000, 16 * 16000))
        rhythm = 0.05 * (1 + np.sin(np.arange(samples) * 2 * np.pi * 4 / 16000))
        path = folder / f"{len(cuts):05d}.flac"
        soundfile.write(path, rhythm * rng.standard_normal(samples), 16000)
        recording = Recording.from_file(path)
        cuts.append(MonoCut(path.stem, 0.0, recording.duration, 0, recording=recording))
    return CutSet.from_cuts(cuts)


def extraction(folder: Path, minutes: float) -> str:
    """Hours of audio per CPU hour of one process, ours and lhotse's by turns, the best of three."""
    cuts = list(made_up_speech(folder / "audio", minutes))
    hours = sum(cut.duration for cut in cuts) / 3600
    waves = [features.read_audio(cut) for cut in cuts]
    lhotse = Fbank()
    settings = config.Features()

    def ours_stored() -> None:
        features.compute_shard(cuts, 1.0, folder / "ours", settings)

    def theirs_stored() -> None:
        with NumpyFilesWriter(folder / "theirs") as storage:
            for cut in cuts:
                cut.compute_and_store_features(lhotse, storage)

    rates = _by_turns(hours, {
        "features of samples in memory, ours": lambda: [features.fbank(wave) for wave in waves],
        "features of samples in memory, lhotse": lambda: [lhotse.extract(w, 16000) for w in waves],
        "FLAC to stored features, ours": ours_stored,
        "FLAC to stored features, lhotse": theirs_stored,
        "FLAC to samples (part of both)": lambda: [features.read_audio(cut) for cut in cuts],
    })  # fmt: skip
    differ = max(
        float(abs(features.fbank(wave) - lhotse.extract(wave, 16000)).max()) for wave in waves[:50]
    )
    lines = [f"{len(cuts)} cuts, {60 * hours:.0f} min; hours of audio per CPU hour:"]
    lines += [f"  {rate:6.0f}  {what}" for what, rate in rates.items()]
    return "\n".join([*lines, f"they differ by {differ:.4f} at most"])


def _by_turns(hours: float, what: dict[str, Callable[[], Any]]) -> dict[str, float]:
    best = dict.fromkeys(what, 0.0)
    for _ in range(3):
        for name, run in what.items():
            start = time.process_time()
            run()
            best[name] = max(best[name], 3600 * hours / (time.process_time() - start))
    return best


def bench_fbank(folder: Path, args: argparse.Namespace) -> None:
    """Prints how fast features are computed."""
    said, memory = in_process(extraction, folder, args.minutes)
    print(f"fbank: {said}\npeak memory {memory:.2f} GB")


def bench_loading(folder: Path, args: argparse.Namespace) -> None:
    """Batches per second and memory at two sizes of corpus."""
    bench_loader(folder, [20_000, 200_000], args.batches)


def bench_text(folder: Path, args: argparse.Namespace) -> None:
    """Prints the speed of each language's normaliser on the sentences of its table."""
    del folder, args
    for table in sorted(TABLES.glob("*.tsv")):
        normalizer = Normalizer(table.stem)
        lines = table.read_text(encoding="utf-8").splitlines()
        rows = [line.split("\t") for line in lines if not line.startswith("#")]
        speeds = []
        for sentences in ([f"{row[1].capitalize()}." for row in rows], [row[0] for row in rows]):
            times = []
            for _ in range(REPEATS):
                begin = time.perf_counter()
                for sentence in sentences:
                    normalizer(sentence)
                times.append(time.perf_counter() - begin)
            speeds.append(len(sentences) / min(times))
        plain, numbers = speeds
        print(
            f"text: {table.stem}: {plain:,.0f} sentences of words per second, {numbers:,.0f} of "
            f"the table's with numbers, {plain / numbers:.0f} times as long each"
        )


SECTIONS = {
    "text": bench_text,
    "fbank": bench_fbank,
    "loader": bench_loading,
}


def main() -> None:
    """Runs the sections that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="default: all")
    parser.add_argument("--minutes", type=float, default=20, help="of audio, default %(default)s")
    parser.add_argument("--batches", type=int, default=60, help="to load, default %(default)s")
    parser.add_argument("--folder", type=Path, help="where the made-up data goes")
    args = parser.parse_args()
    for name in args.sections or SECTIONS:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            SECTIONS[name](Path(folder), args)


if __name__ == "__main__":
    main()
