"""What hotwords find and make up, by their score.

    python benchmarks/bench_hotwords.py --exp egs/nl/exp/NAME --other DIR

The hotwords are words of the test set, of five letters or more, which modified beam search without
hotwords misses at least once.  For each score: how many of their occurrences are found in the test
set, WER there, and how many are heard in other speech that nobody said.  The other speech is the
recordings of the recipe that the experiment was not trained on, and the recordings in DIR, which
have a transcripts.tsv (path, text).  What is said in neither is taken from its transcript.

The encoder runs once a recording, chunk by chunk; the search, once a score.  One line a score.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import soundfile
import torch
from torch import Tensor

from icetransfer import score
from icetransfer.data.features import read_manifest
from icetransfer.data.subset import read_subset, subset_path
from icetransfer.data.text.normalizer import Normalizer
from icetransfer.data.tokenizer import Tokenizer
from icetransfer.decode import Reader, _features
from icetransfer.experiment import Experiment, open_experiment
from icetransfer.model.checkpoint import load_transducer
from icetransfer.model.transducer import TransducerModel
from icetransfer.streaming.guided import GuidedBeamSearch
from icetransfer.streaming.hotwords import Hotword, HotwordGraph
from icetransfer.streaming.search import SHERPA
from icetransfer.streaming.streams import Samples, tail_seconds

SCORES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
SHORTEST = 5  # letters of a hotword
BATCH = 64


class Spoken(NamedTuple):
    """What the encoder made of a recording, and what was said."""

    out: Tensor  # (T, C)
    text: str
    seconds: float


@torch.inference_mode()
def encode(
    model: TransducerModel, recordings: Iterable[tuple[Samples, str]], size: int, left: int
) -> Iterator[Spoken]:
    """Runs the encoder as a stream would."""
    for samples, text in recordings:
        features = _features(samples, tail_seconds(size))[None]
        out, _ = model.encode(features, torch.tensor([features.size(1)]), size, left)
        yield Spoken(out[0], text, len(samples) / 16000)


def of_corpora(experiment: Experiment, split: str) -> Iterator[tuple[Samples, str]]:
    """Recordings of a split, of training those that the experiment was not trained on."""
    trained = read_subset(subset_path(experiment)) if split == "train" else set()
    for corpus in experiment.config.data.corpora:
        cuts = read_manifest(experiment.manifests_dir / f"{corpus}_{split}.jsonl.gz")
        unheard = {cut.id: cut for cut in cuts if (corpus, cut.id) not in trained}
        for key, samples in Reader(unheard.values()):
            yield samples, unheard[key].supervisions[0].text or ""


def of_folder(folder: Path, normalize: Normalizer) -> Iterator[tuple[Samples, str]]:
    """Recordings of a folder with a transcripts.tsv."""
    with (folder / "transcripts.tsv").open(encoding="utf-8", newline="") as lines:
        for path, text, *_ in csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
            samples, _ = soundfile.read(folder / path, dtype="float32")
            yield samples, normalize(text)


def recognise(
    model: TransducerModel, tokenizer: Tokenizer, spoken: Sequence[Spoken], hotwords: list[Hotword]
) -> list[score.Row]:
    """Searches what was encoded; rows with ref and hyp."""
    graph = HotwordGraph(hotwords)
    search = GuidedBeamSearch(model, 4, SHERPA, hotwords=graph)
    rows = []
    for first in range(0, len(spoken), BATCH):
        part = spoken[first : first + BATCH]
        out = torch.nn.utils.rnn.pad_sequence([s.out for s in part], batch_first=True)
        # as a stream: a phrase that the end breaks off keeps what it has earned
        state = search.advance(
            search.initial_state(len(part)), out, torch.tensor([len(s.out) for s in part])
        )
        for one, found in zip(part, search.results(state), strict=True):
            rows.append({"ref": one.text, "hyp": tokenizer.decode(found.tokens)})
    return rows


def missed_words(rows: Iterable[score.Row]) -> list[str]:
    """Words of `SHORTEST` letters or more that are in a reference more often than heard."""
    missed = set()
    for row in rows:
        lacking = Counter(row["ref"].split()) - Counter(row["hyp"].split())
        missed |= {word for word in lacking if len(word) >= SHORTEST}
    return sorted(missed)


def main() -> None:
    """Prints the curve."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--exp", type=Path, required=True)
    parser.add_argument("--other", type=Path, action="append", default=[])
    parser.add_argument("--chunk-size", type=int, default=16)
    parser.add_argument("--every", type=int, default=1, help="take one in N of the others")
    args = parser.parse_args()
    every = args.every
    torch.set_num_threads(1)
    experiment = open_experiment(args.exp)
    model = load_transducer(experiment.averaged_checkpoint)
    tokenizer = Tokenizer(experiment.lang_dir / "bpe.model")
    tier = (args.chunk_size, experiment.config.decode.left_context_frames)
    test = list(encode(model, of_corpora(experiment, "test"), *tier))
    normalize = Normalizer(experiment.config.language)
    others = {
        "recipe": [
            one
            for split in ("train", "dev")
            for one in encode(model, islice(of_corpora(experiment, split), 0, None, every), *tier)
        ]
    }
    for folder in args.other:
        chosen = islice(of_folder(folder, normalize), 0, None, every)
        others[folder.name] = list(encode(model, chosen, *tier))
    words = missed_words(recognise(model, tokenizer, test, []))
    print(f"{len(words)} hotwords: {', '.join(words)}")
    for name, spoken in {"test": test, **others}.items():
        print(f"{name}: {sum(one.seconds for one in spoken) / 60:.1f} minutes")
    for value in SCORES:
        hotwords = [Hotword(word, tuple(tokenizer.encode(word)), value) for word in words]
        rows = recognise(model, tokenizer, test, hotwords)
        counts = score.hotword_counts(rows, words)
        said = counts["hotwords_found"] + counts["hotwords_missed"]
        line = f"{value:g}: found {counts['hotwords_found']} of {said}, made up "
        line += f"{counts['hotwords_made_up']}, WER {score.word_errors(rows).rate:.2f}"
        for name, spoken in others.items():
            made = score.hotword_counts(recognise(model, tokenizer, spoken, hotwords), words)
            hours = sum(one.seconds for one in spoken) / 3600
            line += f"; {name}: {made['hotwords_made_up'] / hours:.0f} made up an hour"
        print(line, flush=True)


if __name__ == "__main__":
    main()
