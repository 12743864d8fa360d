"""What loading costs, and that its memory does not grow with the corpus: bench_data.py's section.

    python benchmarks/bench_data.py loader

For each number of cuts, all parts of one recording, and for features that are stored and that are
computed on the fly: the blocks are made in one process, and batches are loaded in another, without
helpers.  It starts at the end of a block, of three in turn, so that the next one is read beside it
as in the middle of training; that is in the time of the first batch, and not in the rate.
"""

import gzip
import json
import multiprocessing
import random
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from lhotse import Features, MonoCut, Recording, SupervisionSegment

from icetransfer import config
from icetransfer.data import blocks, features, loader
from icetransfer.data.shards import ShardReader
from icetransfer.data.subset import subset_path
from icetransfer.data.tokenizer import Tokenizer, train_tokenizer
from icetransfer.experiment import Experiment
from icetransfer.stage import atomic

WORDS = ("de", "het", "een", "van", "en", "in", "op", "met", "voor", "niet", "zijn", "maar", "ook")
RECORDING_SECONDS = 16
BATCH_SECONDS = 200
ENDS = 3  # of blocks or epochs


def measured(section: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """Runs a section in a fresh process; returns what it gives and its peak memory in MB."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_run, (section, arguments))


def _run(section: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, float]:
    torch.set_num_threads(1)
    result = section(*arguments)
    # Not getrusage's peak: that begins with what the parent had.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return result, int(status.partition("VmHWM:")[2].split()[0]) / 1e3


def made_up_experiment(folder: Path, store: str) -> Experiment:
    """An experiment on the folder's data."""
    settings = [
        "language=nl", f"data.dir={folder}", "data.corpora={made: {kind: folder, path: unused}}",
        f"data.features.store={store}", f"train.batch_seconds={BATCH_SECONDS}",
    ]  # fmt: skip
    return Experiment(folder / f"exp-{store}", config.load_config([], settings))


def write_data(folder: Path, store: str, cuts: int) -> None:
    """What stages 1 to 4 leave of so many cuts of 1 to 15 seconds."""
    experiment = made_up_experiment(folder, store)
    rng = random.Random(1)
    samples = 0.1 * np.random.default_rng(1).standard_normal(16000 * RECORDING_SECONDS)
    audio, shard = folder / "audio.flac", folder / "shard.npy"
    soundfile.write(audio, samples, 16000)
    np.save(shard, features.fbank(samples.astype(np.float32)).astype(np.float16))
    recording = Recording.from_file(audio, recording_id="made")
    stored = store == "precomputed"
    names = []
    experiment.manifests_dir.mkdir(exist_ok=True)
    manifest = experiment.manifests_dir / "made_train_fbank.jsonl.gz"
    with gzip.open(manifest, "wt", compresslevel=1, encoding="utf-8") as lines:
        for number in range(cuts):
            names.append(f"made-{number:07d}")
            frames = rng.randrange(100, 1500)
            start, seconds = rng.randrange(100), frames / 100
            text = " ".join(rng.choices(WORDS, k=1 + frames // 40))
            said = SupervisionSegment(names[-1], "made", 0.0, seconds, text=text, language="nl")
            described = Features(
                type="icetransfer-fbank", num_frames=frames, num_features=80, frame_shift=0.01,
                sampling_rate=16000, start=start / 100, duration=seconds, recording_id="made",
                channels=0, storage_path=str(shard) if stored else "",
                storage_type=ShardReader.name if stored else features.ON_THE_FLY,
                storage_key=f"{start}:{start + frames}" if stored else "",
            )  # fmt: skip
            custom = {"source_id": names[-1]}
            cut = MonoCut(
                names[-1], start / 100, seconds, 0, [said], described, recording, custom=custom
            )
            lines.write(json.dumps(cut.to_dict()) + "\n")
    atomic.write_text(subset_path(experiment), "".join(f"made {name}\n" for name in names))
    experiment.lang_dir.mkdir(parents=True, exist_ok=True)
    (experiment.lang_dir / "bpe.model").write_bytes(train_tokenizer(WORDS, 40))


def make_blocks(folder: Path, store: str) -> float:
    """Seconds that the blocks take, once for an experiment."""
    start = time.perf_counter()
    blocks.hold_blocks(made_up_experiment(folder, store))
    return time.perf_counter() - start


def load(folder: Path, store: str, batches: int) -> dict[str, float]:
    """Loads batches over the ends of some blocks, or of epochs where there is one block."""
    experiment = made_up_experiment(folder, store)
    tokenizer = Tokenizer(experiment.lang_dir / "bpe.model")
    held = blocks.open_blocks(blocks.training_data(experiment))
    after = 10**9  # batches of a block: so many are its end
    places = [
        loader.Place(0, number, after) if number < held.count else loader.Place(number, 0, after)
        for number in range(ENDS)
    ]
    first, seconds, audio, count = 0.0, 0.0, 0.0, 0
    for place in places:
        reader = loader.train_loader(experiment, tokenizer)
        reader.load_state_dict({"places": [asdict(place)], "shares": 1})
        start = time.perf_counter()
        some = iter(reader)
        next(some)
        first = max(first, time.perf_counter() - start)
        start = time.perf_counter()
        for _ in range(batches // len(places)):
            audio += next(some).seconds
            count += 1
        seconds += time.perf_counter() - start
    return {"rate": count / seconds, "audio": audio / seconds, "first": first}


def bench_loader(folder: Path, sizes: list[int], batches: int) -> None:
    """Prints rates and memory for each way to get features and each size."""
    for store in ("precomputed", "on_the_fly"):
        for cuts in sizes:
            place = folder / f"{store}-{cuts}"
            place.mkdir()
            write_data(place, store, cuts)
            made, making = measured(make_blocks, place, store)
            found, loading = measured(load, place, store, batches)
            print(
                f"loader, {store}, {cuts} cuts: {found['rate']:.1f} batches of {BATCH_SECONDS} s "
                f"per second ({found['audio']:.0f} s of audio per second), peak memory "
                f"{loading:.0f} MB; first batch after at most {found['first']:.1f} s; blocks made "
                f"once in {made:.0f} s with {making:.0f} MB",
                flush=True,
            )
