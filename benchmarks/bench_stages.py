"""What the data stages cost with millions of cuts: CPU time, and peak memory against the limit.

    python benchmarks/bench_stages.py [prepare] [choose] [look]

prepare     stages 1 and 2 on a corpus of many recordings, but for decoding and filter banks
choose      stages 3 and 4 and the making of training blocks, on made-up manifests
look        icetransfer.look on the same manifests, without a model, and without any audio to play

Each step runs in a process of its own that imports what the stage does; afterwards again, to see
what it costs to find that nothing has changed.  Everything is made up in a temporary folder
(--folder chooses its place) and removed.  5 million cuts take some 6 GB of disk there, and a
million inodes.
"""

import argparse
import gzip
import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lhotse import MonoCut

    from icetransfer.data.utterances import Utterance
    from icetransfer.experiment import Experiment

CORPORA = {"audiobooks": 0.8, "parliament": 0.2}  # share of the cuts
HELD_OUT = 2000  # cuts of each dev and test split
LIMIT_GB = 1.2  # of memory that a stage may take
FILES = 1_000_000  # of audio at most: further recordings are further parts of them
SHARDS = 20_000  # of features, looked at for their cost
WORDS = ("de", "het", "een", "van", "en", "in", "op", "niet", "zijn", "maar", "ook", "dan", "naar")


def made_up_rows(corpus: str, split: str, cuts: int) -> Iterator[tuple[str, str]]:
    """JSON of cuts as stage 1 and stage 2 (at one speed) write them."""
    from lhotse import Features, MonoCut, Recording, SupervisionSegment
    from lhotse.audio import AudioSource

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


def _template(cut: "MonoCut") -> str:
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


def made_up_check(utterance: "Utterance", *_: Any) -> dict[str, Any]:
    """What `recordings.check` gives of a recording, without decoding it."""
    name, seconds = utterance.id, utterance.seconds
    place = {"id": name, "start": utterance.start, "duration": seconds}
    said = {
        "id": name, "recording_id": name, "start": 0.0, "duration": seconds, "channel": 0,
        "text": utterance.text, "language": "nl", "speaker": utterance.speaker,
        "custom": {"raw_text": utterance.text},
    }  # fmt: skip
    recording = {
        "id": name, "sampling_rate": 16000, "num_samples": 9_600_000, "duration": 600.0,
        "sources": [{"type": "file", "channels": [0], "source": str(utterance.path)}],
        "channel_ids": [0],
    }  # fmt: skip
    return {
        **place, "channel": 0, "supervisions": [said], "recording": recording,
        "custom": {"audio_digest": hashlib.sha256(name.encode()).hexdigest()[:24]},
        "type": "MonoCut",
    }  # fmt: skip


def write_corpus(folder: Path, cuts: int) -> None:
    """A NeMo manifest of parts of empty files, which nobody opens."""
    rng = random.Random("corpus")
    files = min(cuts, FILES)
    names = [f"{number % 1000:03d}/{number:07d}.flac" for number in range(files)]
    for number, name in enumerate(names):
        if number < 1000:
            (folder / "audio" / name).parent.mkdir(parents=True)
        (folder / "audio" / name).touch()
    for split, count, begin in (
        ("train", cuts, 0.0), ("dev", HELD_OUT, 200.0), ("test", HELD_OUT, 300.0)
    ):  # fmt: skip
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for number in range(count):
                seconds = rng.uniform(1, 15)
                row = {
                    "audio_filepath": f"audio/{names[number % files]}", "duration": seconds,
                    "offset": 20.0 * (number // files) + begin,
                    "text": " ".join(rng.choices(WORDS, k=1 + int(2.5 * seconds))),
                    "speaker": f"s{rng.randrange(1 + cuts // 200)}",
                }  # fmt: skip
                file.write(json.dumps(row) + "\n")


def experiment_of(corpora: str) -> "Experiment":
    """An experiment of this folder that learns from all of its data, at one speed."""
    from icetransfer import config
    from icetransfer.experiment import Experiment

    settings = ["language=nl", "data.dir=data", f"data.corpora={{{corpora}}}"]
    settings += ["data.features={store: on_the_fly, speeds: [1.0]}"]
    return Experiment(Path("exp"), config.load_config([], settings))


def prepared() -> "Experiment":
    """The experiment of `write_corpus`."""
    lists = "train: [train.jsonl], dev: [dev.jsonl], test: [test.jsonl]"
    return experiment_of(f"c: {{kind: jsonl, {lists}}}")


def chosen() -> "Experiment":
    """The experiment of `write_manifests`."""
    return experiment_of(", ".join(f"{name}: {{kind: folder, path: unused}}" for name in CORPORA))


def stage_1() -> None:
    """Stage 1, but for the decoding, which is the same for each recording."""
    from icetransfer.data import corpora

    corpora.check = made_up_check  # type: ignore[assignment]  # its processes are forked
    corpora.prepare(prepared())


def look_at_files() -> None:
    """What the second run of stage 1 does to see whether a recording was replaced."""
    from icetransfer.data import corpora

    assert not corpora._replaced(Path("data/manifests/c_audio.jsonl.gz"))


def stage_2() -> None:
    """Stage 2, with features that are computed when they are needed."""
    from icetransfer.data import features

    features.compute_features(prepared())


def look_at_shards() -> None:
    """What the second run of stage 2 does to see whether a shard is damaged."""
    from icetransfer.data import features
    from icetransfer.stage.share import ALL

    features._forget_damaged_shards(Path("target"), Path("shards"), ALL)


def stage_3() -> None:
    """Stage 3."""
    from icetransfer.data import subset

    subset.make_subset(chosen())


def stage_4() -> None:
    """Stage 4."""
    from icetransfer.data import tokenizer

    tokenizer.make_tokenizer(chosen())


def make_blocks() -> None:
    """What training begins with."""
    from icetransfer.data import blocks

    blocks.hold_blocks(chosen())


def take_a_look() -> None:
    """icetransfer.look, whose tables go to nowhere."""
    import contextlib

    from icetransfer import look

    with (
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        look.write_look(chosen())


STEPS: dict[str, Callable[[], None]] = {
    step.__name__: step
    for step in (
        *(stage_1, look_at_files, stage_2, look_at_shards, stage_3, stage_4, make_blocks),
        *(take_a_look,),
    )
}


def measure(step: str, cuts: int) -> None:
    """Runs a step in this process, and prints what it took of it and of those that it started."""
    start, begun = _cpu_seconds(), time.monotonic()
    STEPS[step]()
    cpu, wall = _cpu_seconds() - start, time.monotonic() - begun
    memory = _peak_gb()
    others = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    more = f", {others:.2f} GB of the largest that it starts" if others else ""
    over = "" if memory <= LIMIT_GB else f", over the limit of {LIMIT_GB} GB"
    print(
        f"{cpu:.0f} s of CPU, {wall:.0f} s of time; {1e6 * cpu / cuts:.1f} s of CPU per million; "
        f"peak memory {memory:.2f} GB{more}{over}"
    )


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _peak_gb() -> float:
    """Not getrusage's: that begins with what the parent had."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1e6


def run(folder: Path, cuts: int, what: dict[str, str]) -> None:
    """Runs steps, each in a fresh process."""
    for title, step in what.items():
        done = subprocess.run(
            [sys.executable, str(Path(__file__).resolve()), "--step", step, "--cuts", str(cuts)],
            cwd=folder, check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        print(f"{title}: {done.stdout.strip()}", flush=True)


def bench_prepare(folder: Path, cuts: int) -> None:
    """Stages 1 and 2."""
    write_corpus(folder, cuts)
    run(folder, cuts, {
        "stage 1, all but decoding": "stage_1",
        "stage 1 again": "stage_1",
        "  of which a look at each file": "look_at_files",
        "stage 2, all but filter banks": "stage_2",
        "stage 2 again": "stage_2",
    })  # fmt: skip
    # As one manifest and one array after another are written, at three speeds, 8 seconds a cut.
    empty = b"\x93NUMPY\x01\x00v\x00{'descr': '<f2', 'fortran_order': False, 'shape': (0, 80), }"
    (folder / "shards").mkdir()
    for number in range(SHARDS):
        stem = folder / "shards" / f"speed-1-{number:05d}"
        stem.with_suffix(".npy").write_bytes(empty.ljust(127) + b"\n")
        stem.with_suffix(".jsonl.gz").touch()
    run(folder, SHARDS * 600 // 8 // 3, {"  and a look at each stored shard": "look_at_shards"})


def bench_choose(folder: Path, cuts: int) -> None:
    """Stages 3 and 4, and what training begins with."""
    write_manifests(folder / "data" / "manifests", cuts)
    run(folder, cuts, {
        "stage 3": "stage_3",
        "stage 3 again": "stage_3",
        "stage 4": "stage_4",
        "stage 4 again": "stage_4",
        "training blocks": "make_blocks",
        "training blocks again": "make_blocks",
    })  # fmt: skip


def bench_look(folder: Path, cuts: int) -> None:
    """What `python -m icetransfer.look` costs."""
    write_manifests(folder / "data" / "manifests", cuts)
    run(folder, cuts, {"a look": "take_a_look"})


SECTIONS = {"prepare": bench_prepare, "choose": bench_choose, "look": bench_look}


def main() -> None:
    """Runs the sections that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="default: all")
    parser.add_argument("--cuts", type=int, default=5_000_000, help="default %(default)s")
    parser.add_argument("--folder", type=Path, help="where the made-up data goes")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        measure(args.step, args.cuts)
        return
    for name in args.sections or SECTIONS:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            SECTIONS[name](Path(folder), args.cuts)


if __name__ == "__main__":
    main()
