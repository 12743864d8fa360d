"""How fine-tuning is to be set: rates, freezing and length, tried at several amounts of data.

    python benchmarks/bench_finetune.py run --work DIR [--worker 0/2] [GRID ...]
    python benchmarks/bench_finetune.py table

`run` trains and decodes every cell of the named grids (default: all of them, in their order) and
adds a line to `benchmarks/finetune.jsonl` for each.  A cell that has its line is skipped and one
that was killed goes on from its last checkpoint, so it can be stopped and started at any time.
With `--worker 0/3`, 1/3 and 2/3 three processes side by side share the cells.  DIR takes the data
and the experiments, some hundred megabytes.  `table` prints the lines as Markdown, the mean over
seeds with the number of them.

A cell's figures: dev losses at the end, and WER and CER on the test recordings at 320 ms, greedy
search, fp32, from the averaged weights.  What they led to is in docs/decisions.md.
"""

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "finetune.jsonl"

LOADED = ("encoder_embed", "encoder")
NEW = ("joiner", "simple_am_proj", "simple_lm_proj", "ctc_output")


@dataclass(frozen=True)
class Cell:
    """One fine-tuning.

    Attributes:
        recipe: the folder in egs/ whose text rules and corpus it has.
        data: "slots" for the recipe's synthetic corpus, or a folder of recordings in $SPEECH.
        hours: of training data, as config's `hours`; "all" for all.
        init: en or ml.
        steps: of the weights.
        batch: seconds of audio in each.
        loaded: factor on the learning rate of what the base model gives.
        frozen: steps in which that part stays as it was.
        new: factor on the learning rate of the projections that start from noise.
        decoder: factor on that of the decoder.
        accumulate: batches in a step.
        seed: of everything random.
    """

    recipe: str
    data: str
    hours: str
    init: str
    steps: int
    batch: float
    loaded: float
    frozen: int
    new: float = 1
    decoder: float = 1
    accumulate: int = 1
    seed: int = 1

    def overrides(self) -> list[str]:
        """What the cell sets in the config."""
        scales = dict.fromkeys(LOADED, self.loaded) | dict.fromkeys(NEW, self.new)
        scales["decoder"] = self.decoder
        frozen = dict.fromkeys(LOADED, self.frozen)
        return [
            f"language={self.recipe}",
            f"init={self.init}",
            f"hours={'null' if self.hours == 'all' else self.hours}",
            f"seed={self.seed}",
            f"train.max_steps={self.steps}",
            f"train.batch_seconds={self.batch}",
            f"train.accumulate={self.accumulate}",
            f"train.lr_scale={json.dumps(scales)}",
            f"train.freeze={json.dumps(frozen)}",
            f"train.schedule.warmup_steps={min(100, self.steps // 10)}",
            f"train.loss_warmup_steps={min(100, self.steps // 10)}",
            f"train.valid_every={max(self.steps // 5, 1)}",
            f"train.checkpoint_every={max(self.steps // 5, 1)}",
            "train.average_fraction=0.2",
            "train.keep_checkpoints=1",
            "decode.engines=[torch]",
            "decode.precisions=[fp32]",
            "decode.chunk_sizes=[16]",
        ]

    def corpus(self) -> list[str]:
        """Where its recordings come from."""
        if self.data == "slots":
            minutes = {"train": 600 if self.hours == "10h" else 30, "dev": 2.5, "test": 4}
            return [f"data.corpora.slots.minutes={json.dumps(minutes)}"]
        return [
            "data.corpora.slots=null",
            "data.corpora.folder={kind: folder, holdout_every: 10, path: "
            f"{json.dumps(str(speech() / self.data))}}}",
            "data.vocab_size=80",
        ]


def speech() -> Path:
    """Folders of real recordings, for the grids that need them: the environment's SPEECH."""
    folder = os.environ.get("SPEECH")
    if not folder:
        raise SystemExit("set SPEECH to a folder that holds folders of audio and transcripts.tsv")
    return Path(folder)


def _rates(hours: str, steps: int, seed: int = 1) -> Iterator[Cell]:
    """Encoder's rate x freezing x init, at an amount of synthetic Dutch."""
    for loaded, share, init in itertools.product((0.1, 0.3, 0.03, 1), (0, 0.2), ("ml", "en")):
        frozen = int(share * steps)
        yield Cell("nl", "slots", hours, init, steps, 16, loaded, frozen, seed=seed)


def _short(hours: str, steps: int, seed: int = 1) -> Iterator[Cell]:
    """Few steps, as the mini preset has: how fast, and whether what is new needs a faster rate."""
    for (loaded, share), new, decoder in itertools.product(
        ((0.1, 0), (0.3, 0), (0.3, 0.35), (1, 0)), (6, 12, 3, 1), (1, 0.1)
    ):
        frozen = int(share * steps)
        yield Cell("nl", "slots", hours, "ml", steps, 16, loaded, frozen, new, decoder, seed=seed)


def _freeze(hours: str, steps: int, new: float, seed: int = 1) -> Iterator[Cell]:
    """What freezing first allows: a faster rate afterwards, for longer."""
    for loaded, share, init in (
        *((0.1, 0.35, "ml"), (0.3, 0.35, "ml"), (1, 0.35, "ml"), (0.3, 0.2, "ml")),
        *((0.3, 0.5, "ml"), (0.1, 0, "ml"), (0.3, 0.35, "en"), (0.1, 0, "en")),
    ):
        yield Cell(
            "nl", "slots", hours, init, steps, 16, loaded, int(share * steps), new, seed=seed
        )


def _length(seed: int = 1) -> Iterator[Cell]:
    """How many steps are enough at each amount, and whether short runs need faster projections."""
    for hours, steps, new in itertools.product(
        ("2min", "30min"), (400, 1000, 2500, 5000), (1, 3, 6)
    ):
        yield Cell("nl", "slots", hours, "ml", steps, 16, 0.1, 0, new=new, seed=seed)


def _new() -> Iterator[Cell]:
    """The scheme's own rates and freezing, but what is new at rates of its own."""
    for hours, steps, decoder in (("2min", 1500, 0.1), ("8min", 1500, 0.1), ("30min", 2500, 1)):
        for new in (6, 2500 / steps, 3):
            frozen = steps // 5
            yield Cell("nl", "slots", hours, "ml", steps, 16, 0.3, frozen, round(new, 2), decoder)


def _batch() -> Iterator[Cell]:
    """public.yaml's batch of 400 s, by accumulation."""
    for loaded, new, steps in itertools.product((0.1, 0.3, 1), (1, 3), (220, 600)):
        yield Cell("nl", "slots", "30min", "ml", steps, 16, loaded, 0, new=new, accumulate=25)


def _real(recipe: str, data: str) -> Iterator[Cell]:
    """Real recordings, all of them."""
    for loaded, share, init in itertools.product((0.1, 0.3, 0.03, 1), (0, 0.2), ("ml", "en")):
        yield Cell(recipe, data, "all", init, 2500, 20, loaded, int(share * 2500))


GRIDS = {
    "freeze-8min": lambda: _freeze("8min", 420, 6),
    "freeze-30min": lambda: _freeze("30min", 2500, 1),
    "freeze-2min": lambda: _freeze("2min", 1000, 2.5),
    "short-8min": lambda: _short("8min", 420),
    "rates-30min": lambda: _rates("30min", 2500),
    "length": _length,
    "rates-2min": lambda: _rates("2min", 1000),
    "real-nl": lambda: _real("nl", "nl_nathalie"),
    "rates-10h": lambda: _rates("10h", 8000),
    "new": _new,
    "batch": _batch,
    "real-it": lambda: _real("it", "it_asterisk_carlo"),
    "short-8min-seed2": lambda: _short("8min", 420, seed=2),
    "rates-30min-seed2": lambda: _rates("30min", 2500, seed=2),
    "rates-2min-seed2": lambda: _rates("2min", 1000, seed=2),
    "length-seed2": lambda: _length(seed=2),
}


def _lines() -> list[dict[str, object]]:
    if not RESULTS.is_file():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def _key(cell: Cell) -> str:
    return json.dumps(vars(cell), sort_keys=True)


def run_cell(cell: Cell, work: Path) -> dict[str, object]:
    """Trains and decodes a cell, from where it was, and returns its figures."""
    from icetransfer import config, decode, experiment, train, transfer
    from icetransfer.average import average_run
    from icetransfer.data import corpora, download, features, subset, tokenizer
    from icetransfer.stage.lock import locked

    os.chdir(REPOSITORY / "egs" / cell.recipe)
    corpus = cell.data if cell.data != "slots" or cell.hours != "10h" else "slots-10h"
    shared = f"data.dir={work / 'data' / f'{cell.recipe}-{corpus}'}"
    resolved = config.load_config(
        [Path("conf/default.yaml")], [*cell.overrides(), *cell.corpus(), shared]
    )
    name = "-".join(str(value) for value in vars(cell).values())
    exp = experiment.create_experiment(work / "exp" / name, resolved)
    began = time.monotonic()
    with locked(exp.data_dir, "bench_finetune", waits=True):
        for stage in (
            *(download.download, corpora.prepare, features.compute_features),
            *(subset.make_subset, tokenizer.make_tokenizer),
        ):
            stage(exp)
    for stage in (transfer.make_start, train.train, average_run, decode.decode_all):
        stage(exp)
    seconds = time.monotonic() - began
    metrics = (exp.dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    dev = [row for row in map(json.loads, metrics) if row["kind"] == "dev"][-1]
    (result,) = [
        json.loads(p.read_text(encoding="utf-8")) for p in exp.decode_dir.rglob("wer.json")
    ]
    for path in exp.checkpoints_dir.glob("*.pt"):
        path.unlink()
    exp.averaged_checkpoint.unlink()
    exp.init_checkpoint.unlink()
    return vars(cell) | {
        "dev_loss": round(dev["loss"], 4),
        "dev_ctc": round(dev["ctc_loss"], 4),
        **{
            key: result[key]
            for key in ("wer", "cer", "words", "insertions", "deletions")
            if key in result
        },
        "seconds": round(seconds),
    }


def run(names: list[str], work: Path, worker: int, workers: int) -> None:
    """Does what is not done of the named grids."""
    cells = list(dict.fromkeys(cell for name in names for cell in GRIDS[name]()))
    for number, cell in enumerate(cells):
        done = {
            _key(Cell(**{k: v for k, v in line.items() if k in vars(cell)})) for line in _lines()
        }
        if number % workers != worker or _key(cell) in done:
            continue
        print(f"{number + 1}/{len(cells)} {cell}", flush=True)
        line = run_cell(cell, work)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)


def table() -> None:
    """The results as Markdown: a row for each setting, its seeds together."""
    rows: dict[tuple[object, ...], list[dict[str, object]]] = {}
    keys = [key for key in Cell.__dataclass_fields__ if key != "seed"]
    for line in _lines():
        rows.setdefault(tuple(line[key] for key in keys), []).append(line)
    print("| " + " | ".join([*keys, "seeds", "dev loss", "dev CTC", "WER"]) + " |")
    print("|---" * (len(keys) + 4) + "|")
    for setting, lines in sorted(rows.items(), key=lambda item: tuple(map(str, item[0]))):
        means = [
            statistics.fmean(float(str(x[k])) for x in lines)
            for k in ("dev_loss", "dev_ctc", "wer")
        ]
        figures = [f"{means[0]:.3f}", f"{means[1]:.3f}", f"{means[2]:.1f}"]
        print("| " + " | ".join([*map(str, setting), str(len(lines)), *figures]) + " |")


def main() -> None:
    """Runs cells, or prints what they gave."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("grids", nargs="*", metavar="GRID", help=f"of {', '.join(GRIDS)}")
    runner.add_argument("--work", type=Path, required=True, help="takes data and experiments")
    runner.add_argument("--worker", default="0/1", help="which of how many processes, from 0")
    commands.add_parser("table")
    args = parser.parse_args()
    if args.command == "table":
        table()
        return
    if unknown := [name for name in args.grids if name not in GRIDS]:
        parser.error(f"unknown grid {unknown[0]}; there are {', '.join(GRIDS)}")
    worker, workers = map(int, args.worker.split("/"))
    run(args.grids or list(GRIDS), args.work.resolve(), worker, workers)


if __name__ == "__main__":
    main()
