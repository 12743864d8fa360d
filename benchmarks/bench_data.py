"""What the data side costs at full scale; each section in a process of its own, for its memory.

    python benchmarks/bench_data.py [text] [manifest] [fbank] [loader]

text        sentences per second of the normaliser, words alone and with numbers, by language
manifest    stage 3 and a pass over what it chose, on made-up manifests of many cuts
fbank       hours of audio per CPU hour of stage 2's extraction, beside lhotse's default extractor
loader      batches per second, stored features and on the fly, and memory at two sizes of corpus

Everything is made up in a temporary folder (--folder chooses its place) and removed.  A manifest of
5 million cuts takes 1.2 GB of disk there.
"""

import argparse
import gzip
import json
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from bench_loader import bench_loader
from lhotse import CutSet, Fbank, Features, MonoCut, NumpyFilesWriter, Recording, SupervisionSegment
from lhotse.audio import AudioSource

from icetransfer import config
from icetransfer.data import features, subset
from icetransfer.data.jsonl import read_jsonl_gz
from icetransfer.data.text.normalizer import Normalizer
from icetransfer.experiment import Experiment

CORPORA = {"audiobooks": 0.8, "parliament": 0.2}  # share of the cuts
HELD_OUT = 2000  # cuts of each dev and test split
HOURS = 2500.0
LIMIT_GB = 1.5  # of memory that the manifest section may take
TABLES = Path(__file__).parents[1] / "tests/unit/data/text"
REPEATS = 5  # of which the fastest counts
WORDS = ("de", "het", "een", "van", "en", "in", "op", "niet", "zijn", "maar", "ook", "dan", "naar")


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


def made_up_rows(corpus: str, split: str, cuts: int) -> Iterator[tuple[str, str]]:
    """JSON of cuts as stage 1 and stage 2 (at one speed) write them."""
    rng = random.Random(f"{corpus} {split}")
    recording = Recording("ID", [AudioSource("file", [0], "PATH")], 16000, -1, 1.0)
    said = SupervisionSegment(
        "ID", "ID", 0.0, 1.0, text="TEXT", language="nl", speaker="SPEAKER",
        custom={"raw_text": "TEXT"},
    )  # fmt: skip
    cut = MonoCut("ID", 0.0, 1.0, 0, [said], recording=recording)
    plain = _template(cut)
    cut.custom = {"source_id": "ID"}
    cut.features = Features(
        type="icetransfer-fbank", num_frames=-2, num_features=80, frame_shift=0.01,
        sampling_rate=16000, start=0.0, duration=1.0, storage_type="icetransfer-shard",
        storage_path="SHARD", storage_key="ROWS", recording_id="ID", channels=0,
    )  # fmt: skip
    computed = _template(cut)
    for number in range(cuts):
        speaker = rng.randrange(1 + cuts // 200)
        samples = rng.randrange(16000, 16000 * 15)
        name = f"{speaker}_{number % 97}_{number:07d}"
        frames = samples // 160
        values = {
            "id": name, "path": f"data/corpus/{corpus}/{split}/audio/{speaker}/{name}.opus",
            "samples": samples, "seconds": samples / 16000, "speaker": speaker, "frames": frames,
            "text": " ".join(rng.choices(WORDS, k=1 + samples // 6400)),
            "shard": f"data/fbank/{corpus}_{split}/speed-1-{number // 80:05d}.npy",
            "rows": f"{number % 80 * 800}:{number % 80 * 800 + frames}",
        }  # fmt: skip
        yield plain % values, computed % values


def _template(cut: MonoCut) -> str:
    """The cut's JSON, with fields where the values differ from cut to cut."""
    text = json.dumps(cut.to_dict())
    for placeholder, name in (
        ("ID", "id"), ("PATH", "path"), ("TEXT", "text"), ("SPEAKER", "speaker"),
        ("SHARD", "shard"), ("ROWS", "rows"),
    ):  # fmt: skip
        text = text.replace(f'"{placeholder}"', f'"%({name})s"')
    text = text.replace('"duration": 1.0', '"duration": %(seconds)s')
    return text.replace("-1", "%(samples)d").replace("-2", "%(frames)d")


def write_manifests(folder: Path, cuts: int) -> None:
    """Manifests of two corpora as stages 1 and 3 leave them, quickly packed."""
    folder.mkdir(parents=True)
    for corpus, share in CORPORA.items():
        for split, count in (("train", int(share * cuts)), ("dev", HELD_OUT), ("test", HELD_OUT)):
            with (
                gzip.open(folder / f"{corpus}_{split}.jsonl.gz", "wt", 1) as plain,
                gzip.open(folder / f"{corpus}_{split}_fbank.jsonl.gz", "wt", 1) as computed,
            ):
                for row, computed_row in made_up_rows(corpus, split, count):
                    plain.write(row + "\n")
                    computed.write(computed_row + "\n")


def made_up_experiment(folder: Path, hours: float) -> Experiment:
    """An experiment whose data folder holds the made-up manifests."""
    corpora = ", ".join(f"{name}: {{kind: folder, path: unused}}" for name in CORPORA)
    settings = [
        "language=nl",
        f"hours={hours}",
        f"data.dir={folder}",
        f"data.corpora={{{corpora}}}",
    ]
    return Experiment(folder / "exp", config.load_config([], settings))


def subset_and_open(folder: Path, cuts: int) -> str:
    """Stage 4, then a pass over the chosen cuts' rows as a loader begins with."""
    hours = min(HOURS, cuts / 1e6 * 1000)
    experiment = made_up_experiment(folder, hours)
    start = time.process_time()  # one process that computes, but for some 20 MB/s of reading
    subset.make_subset(experiment)
    chosen = time.process_time() - start
    start = time.process_time()
    seconds, found = 0.0, 0
    names = subset.read_subset(subset.subset_path(experiment))
    for corpus in CORPORA:
        for cut in read_jsonl_gz(experiment.manifests_dir / f"{corpus}_train_fbank.jsonl.gz"):
            if (corpus, cut["custom"]["source_id"]) in names:
                found += 1
                seconds += cut["duration"]
    opened = time.process_time() - start
    assert found == len(names) and abs(seconds / 3600 - hours) < 0.1
    millions = cuts / 1e6
    return (
        f"{cuts} cuts; {found} taken, {hours:g} h\n"
        f"stage 3: {chosen:.0f} s of CPU, {chosen / millions:.1f} s per million cuts\n"
        f"opening and one pass: {opened:.0f} s of CPU, {opened / millions:.1f} s per million cuts"
    )


def bench_manifest(folder: Path, args: argparse.Namespace) -> None:
    """Prints what stage 3 and opening cost."""
    write_manifests(folder / "manifests", args.cuts)
    disk = sum(path.stat().st_size for path in folder.rglob("*.gz")) / 1e9
    print(f"manifest: {disk:.2f} GB on disk", flush=True)
    said, memory = in_process(subset_and_open, folder, args.cuts)
    print(f"{said}\npeak memory {memory:.2f} GB; the limit is {LIMIT_GB} GB")


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
    "manifest": bench_manifest,
    "fbank": bench_fbank,
    "loader": bench_loading,
}


def main() -> None:
    """Runs the sections that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="default: all")
    parser.add_argument("--cuts", type=int, default=5_000_000, help="default %(default)s")
    parser.add_argument("--minutes", type=float, default=20, help="of audio, default %(default)s")
    parser.add_argument("--batches", type=int, default=60, help="to load, default %(default)s")
    parser.add_argument("--folder", type=Path, help="where the made-up data goes")
    args = parser.parse_args()
    for name in args.sections or SECTIONS:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            SECTIONS[name](Path(folder), args)


if __name__ == "__main__":
    main()
