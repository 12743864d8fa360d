"""What augmentation costs, against a training step on the CPU.

    python benchmarks/bench_augment.py [--size tiny] [--rounds 30]

Made-up cuts of 3 s are loaded as training loads them, with each named list of `train.augment`, from
stored features and from audio; between them, training steps on as much audio are timed, so that all
share the machine as it is.  Prints milliseconds for a batch, and what augmentation adds to the sum
of loading and step.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import bench_train
import numpy as np
import soundfile
import torch
from lhotse import MonoCut, Recording, SupervisionSegment

from icetransfer.config import Features, load_config
from icetransfer.data.acoustics import simulated_room
from icetransfer.data.features import compute_shard, read_manifest
from icetransfer.data.surroundings import ROOMS, Augmenter
from icetransfer.model.transducer import build_transducer
from icetransfer.settings.augment import NAMED

SECONDS = 3.0  # of a cut
CUTS = 6  # of a batch


def made_up_cuts(folder: Path, store: str) -> list[MonoCut]:
    """Cuts of a batch, as stage 2 leaves them."""
    rng = np.random.default_rng(1)
    cuts = []
    for number in range(CUTS):
        path = folder / f"{number}.flac"
        soundfile.write(path, 0.05 * rng.standard_normal(int(16000 * SECONDS)), 16000)
        recording = Recording.from_file(path)
        said = SupervisionSegment(path.stem, path.stem, 0, SECONDS, text="een")
        cuts.append(MonoCut(path.stem, 0, SECONDS, 0, [said], recording=recording))
    compute_shard(cuts, 1, folder / store, Features(store=store))
    return read_manifest(folder / f"{store}.jsonl.gz")


def main() -> None:
    """Prints a line for each list and each way to get features."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="tiny", choices=list(bench_train.SIZES))
    parser.add_argument("--rounds", type=int, default=30, help="(%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config([bench_train.CONFIG], ["language=en"])
    dims = bench_train.SIZES[args.size]
    case = bench_train.Case(
        args.size, lambda _: build_transducer(dims.with_vocabulary(60)), CUTS, SECONDS
    )
    bench = bench_train.Bench(case, config, torch.device("cpu"))
    laps: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        cuts = {s: made_up_cuts(Path(folder), s) for s in ("precomputed", "on_the_fly")}
        augmenters = {name: Augmenter(listed, seed=1) for name, listed in NAMED.items()}
        for room in range(ROOMS):  # each is made once in a run, and then kept, as noise is
            simulated_room(room)
        for augmenter in augmenters.values():
            for key in range(100):
                augmenter.load(cuts["precomputed"][0], str(key))
        for turn in range(args.rounds):
            for store, some in cuts.items():
                for name, augmenter in augmenters.items():
                    begin = time.perf_counter()
                    for cut in some:
                        augmenter.load(cut, f"{turn} {cut.id}")
                    laps[f"{store} {name}"].append(time.perf_counter() - begin)
            sizes = config.train.chunk_sizes
            begin = time.perf_counter()
            bench.step(bench_train.Stopwatch(torch.device("cpu")), sizes[turn % len(sizes)])
            laps["step"].append(time.perf_counter() - begin)
    means = {key: 1000 * float(np.mean(found)) for key, found in laps.items()}
    print(f"step of {CUTS * SECONDS:g} s, {args.size}: {means['step']:.1f} ms")
    for store in cuts:
        plain = means[f"{store} none"]
        for name in NAMED:
            loading = means[f"{store} {name}"]
            share = (loading - plain) / (plain + means["step"])
            print(f"{store:<12} {name:<8} loads in {loading:6.1f} ms: {share:+.1%} of a step")
    print(json.dumps({key: round(found, 2) for key, found in means.items()}))


if __name__ == "__main__":
    main()
