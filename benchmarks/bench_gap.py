"""What the analysis of a large sweep costs: the paper's grid, made up, 600 utterances a test set.

    python benchmarks/bench_gap.py [--files 40]

The grid is 8 languages x 5 amounts of data x 2 inits x 4 tiers x 4 test sets x 4 precisions = 5,120
results with 3.1 million utterances, resampled 1,000 times.  Reading is timed on some files and
scaled to all; the analysis, from utterances to everything in gap.json, is timed whole.
"""

import argparse
import itertools
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from icetransfer import gap
from icetransfer.analysis.bootstrap import RESAMPLES
from icetransfer.analysis.significance import Utterances, read_utterances
from icetransfer.analysis.sweep_results import COMPARED, Point, Result

LANGUAGES = ("de", "es", "fr", "it", "nl", "pl", "pt", "ro")
HOURS = (100.0, 250.0, 500.0, 1000.0, 2500.0)
TIERS = (160, 480, 1120, -1)
TEST_SETS = ("fleurs", "commonvoice", "mls", "voxpopuli")
PRECISIONS = ("fp32", "int8", "int4", "int4-encoder")
UTTERANCES, WORDS = 600, 20
LIMIT = 60  # seconds that the analysis may take on two cores


def made_up_sweep(
    rng: np.random.Generator,
) -> tuple[list[Result], dict[Path, Utterances]]:
    """Results of a sweep whose gap is 4.21 (hours / 100)^-0.95 points, and their utterances."""
    ids = tuple(f"u{number:04d}" for number in range(UTTERANCES))
    words = np.full(UTTERANCES, float(WORDS))
    alone = np.arange(UTTERANCES)  # every utterance a cluster: most to draw
    results, utterances = [], {}
    for language, test_set in itertools.product(LANGUAGES, TEST_SETS):
        hard = rng.gamma(2, 0.5, UTTERANCES)
        for hours, init, tier, precision in itertools.product(HOURS, COMPARED, TIERS, PRECISIONS):
            wer = 12 * (hours / 100) ** -0.2 + 0.5 * PRECISIONS.index(precision)
            wer += 4.21 * (hours / 100) ** -0.95 * (init == "en")
            errors = rng.binomial(WORDS, np.minimum(wer / 100 * hard, 0.9)).astype(float)
            found = Utterances(ids, errors, words, alone, "utterance")
            path = Path(language, test_set, f"{hours:g}-{init}-{tier}-{precision}.jsonl")
            point = Point(test_set, precision, tier, hours)
            results.append(Result(language, init, point, found.wer, recogs=path))
            utterances[path] = found
    return results, utterances


def write_recogs(path: Path, errors: np.ndarray) -> None:
    """A recogs.jsonl as stage 9 writes it, with that many errors in each utterance."""
    ref = [f"word{number}" for number in range(WORDS)]
    with path.open("w", encoding="utf-8") as file:
        for number, count in enumerate(errors.astype(int)):
            row = {
                "id": f"u{number:04d}",
                "speaker": "",
                "ref": " ".join(ref),
                "hyp": " ".join(["wrong"] * count + ref[count:]),
                "raw_ref": " ".join(ref),
                "audio_seconds": 8.0,
                "tokens": list(range(2 * WORDS)),
                "timestamps": [round(0.04 * n, 2) for n in range(2 * WORDS)],
                "failed": None,
            }
            file.write(json.dumps(row) + "\n")


def time_reading(utterances: dict[Path, Utterances], files: int) -> float:
    """Seconds of one process for reading and aligning a file, mean over some."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.jsonl" for number in range(files)]
        for path, found in zip(paths, utterances.values(), strict=False):
            write_recogs(path, found.errors)
        start = time.perf_counter()
        read = [read_utterances(path) for path in paths]
        seconds = time.perf_counter() - start
    for found, known in zip(read, utterances.values(), strict=False):
        assert (found.errors == known.errors).all()
    return seconds / files


def main() -> None:
    """Prints what it took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=40, help="to time reading on (%(default)s)")
    args = parser.parse_args()
    results, utterances = made_up_sweep(np.random.default_rng(1))
    each = time_reading(utterances, args.files)
    start, start_cpu = time.perf_counter(), time.process_time()
    analysis = gap.analyse(results, utterances)
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    law = analysis["power_law"][0]
    cores = os.cpu_count() or 1
    reading = each * len(results) / min(cores, 2)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    print(
        f"{len(results)} results of {UTTERANCES} utterances, {RESAMPLES} resamples of languages "
        f"and of utterances\n"
        f"analysis: {seconds:.1f} s ({cpu:.1f} s of CPU, one process), {memory:.1f} GiB at most\n"
        f"reading and aligning: {1000 * each:.0f} ms a file, {reading:.0f} s for all on two cores\n"
        f"together {seconds + reading:.0f} s; the limit is {LIMIT} s\n"
        f"b of the first series: {law['b']:.2f} [{law['b_ci_low']:.2f}, {law['b_ci_high']:.2f}], "
        f"drawn from 0.95"
    )


if __name__ == "__main__":
    main()
