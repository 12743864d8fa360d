"""Batches of training features and tokens, in an order that only the data and the seed decide.

Legend: N batch, T feature frames (10 ms), S tokens.
"""

import gzip
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.dataset.sampling import BucketingSampler, SimpleCutSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from icetransfer import atomic, config
from icetransfer.data.features import NUM_BINS, PADDING, compute, is_on_the_fly, read_manifest
from icetransfer.data.subset import order_key, read_subset, subset_path
from icetransfer.data.tokenizer import Tokenizer
from icetransfer.experiment import Experiment, log, sha256

MAX_BUCKETS = 30
BATCHES_PER_BUCKET = 5  # fewer than this in an epoch, and buckets would leave mostly stumps
SEED_STRIDE = 100_000  # seeds stay apart for so many epochs


@dataclass(frozen=True)
class Batch:
    """One batch; lengths and token arrays are int64.

    Attributes:
        features: (N, T, 80) float32, padded with log(1e-10).
        feature_lens: (N,).
        tokens: (N, S), padded with 0.
        token_lens: (N,).
        ids: names of the N cuts.
        seconds: audio in the batch, padding not counted.
        texts: transcripts of the N cuts.
    """

    features: Tensor
    feature_lens: Tensor
    tokens: Tensor
    token_lens: Tensor
    ids: tuple[str, ...]
    seconds: float
    texts: tuple[str, ...] = ()

    def to(self, device: torch.device) -> "Batch":
        """The batch with all tensors on the device."""
        return replace(
            self,
            features=self.features.to(device, non_blocking=True),
            feature_lens=self.feature_lens.to(device, non_blocking=True),
            tokens=self.tokens.to(device, non_blocking=True),
            token_lens=self.token_lens.to(device, non_blocking=True),
        )

    def pin_memory(self) -> "Batch":
        """The batch in memory from which a GPU can fetch by itself."""
        return replace(
            self, features=self.features.pin_memory(), tokens=self.tokens.pin_memory(),
            feature_lens=self.feature_lens.pin_memory(), token_lens=self.token_lens.pin_memory(),
        )  # fmt: skip

    def split(self, pieces: int) -> list["Batch"]:
        """The batch in at most so many pieces of whole utterances, each padded as it was."""
        size = max(1, -(-len(self.ids) // pieces))
        slices = [slice(start, start + size) for start in range(0, len(self.ids), size)]
        return [
            Batch(
                features=self.features[rows],
                feature_lens=self.feature_lens[rows],
                tokens=self.tokens[rows],
                token_lens=self.token_lens[rows],
                ids=self.ids[rows],
                seconds=self.seconds * len(self.ids[rows]) / len(self.ids),
                texts=self.texts[rows],
            )
            for rows in slices
        ]


def encoder_frames(num_frames: int) -> int:
    """Encoder output frames (40 ms) of so many feature frames."""
    return ((num_frames - 7) // 2 + 1) // 2


def train_cuts(experiment: Experiment) -> list[Cut]:
    """The experiment's training cuts, at every speed."""
    subset = read_subset(subset_path(experiment))
    return [
        cut
        for corpus in experiment.config.data.corpora
        for cut in read_manifest(experiment.manifests_dir / f"{corpus}_train_fbank.jsonl.gz")
        if (corpus, cut.source_id) in subset
    ]


def hold_training_data(experiment: Experiment, cuts: Sequence[Cut]) -> None:
    """Notes in the experiment what it is trained on, or checks that it still is the same.

    Raises:
        ValueError: cuts or tokens are not those that were noted; says which differ.
    """
    path = experiment.dir / "train_data.jsonl.gz"
    found = {cut.id: [cut.num_frames, text_of(cut)] for cut in cuts}
    found["bpe.model"] = [0, sha256(experiment.lang_dir / "bpe.model")]
    if not path.is_file():
        lines = (json.dumps([name, *found[name]], ensure_ascii=False) for name in sorted(found))
        with atomic.atomic_path(path) as temporary:
            temporary.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
        return
    rows = map(json.loads, gzip.decompress(path.read_bytes()).decode().splitlines())
    noted = {name: facts for name, *facts in rows}
    changed = config.differences(noted, found)
    if changed:
        raise ValueError(
            f"{experiment.dir} was trained on other data than there are now; {len(changed)} cuts "
            f"differ (frames and text: before -> now), such as\n  "
            + "\n  ".join(changed[:5])
            + f"\nbring the data back, use another --exp, or remove {experiment.dir} to start anew"
        )


def dev_cuts(experiment: Experiment, max_seconds: float) -> list[Cut]:
    """Up to `max_seconds` of the pooled dev splits, the same ones in every run, longest first."""
    data = experiment.config.data
    named = [
        (order_key(corpus, cut.id), cut)
        for corpus in data.corpora
        for cut in read_manifest(experiment.manifests_dir / f"{corpus}_dev_fbank.jsonl.gz")
        if cut.duration <= data.max_seconds
    ]
    taken, seconds = [], 0.0
    for _, cut in sorted(named, key=lambda pair: pair[0]):
        if seconds >= max_seconds:
            break
        taken.append(cut)
        seconds += cut.duration
    return sorted(taken, key=lambda cut: (-cut.duration, cut.id))


def load_features(cut: Cut) -> np.ndarray:
    """The cut's features, (T, 80) float32.

    Raises:
        ValueError: they cannot be read or computed, or are not as long as the manifest says.
    """
    if is_on_the_fly(cut):
        return compute(cut)
    try:
        features: np.ndarray = cut.load_features()
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"cut {cut.id}: its features in {cut.features.storage_path} cannot be read ({reason}). "
            f"Bring the file back, or remove the split's *_fbank.jsonl.gz in the manifests and "
            f"run stage 3 again; training then goes on from its last checkpoint"
        ) from error
    if features.shape[0] != cut.num_frames:
        raise ValueError(
            f"cut {cut.id}: {cut.features.storage_path} holds {features.shape[0]} frames of it, "
            f"its manifest says {cut.num_frames}: run stage 3 again"
        )
    return features


class Collator:
    """Turns cuts into a `Batch`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, cuts: Sequence[Cut], frames: int = 0) -> Batch:
        """Loads the features and encodes the text of some cuts.

        Args:
            cuts: may be none.
            frames: how far to pad at least.
        """
        if not cuts:
            none = torch.zeros(0, dtype=torch.long)
            features = torch.zeros(0, frames, NUM_BINS)
            return Batch(features, none, none.view(0, 0), none, (), 0.0)
        matrices = [torch.from_numpy(load_features(cut)) for cut in cuts]
        padded = torch.nn.utils.rnn.pad_sequence(matrices, True, padding_value=PADDING)
        missing = max(0, frames - padded.size(1))
        tokens = [
            torch.tensor(self.tokenizer.encode(text_of(cut)), dtype=torch.long) for cut in cuts
        ]
        return Batch(
            features=torch.nn.functional.pad(padded, (0, 0, 0, missing), value=PADDING),
            feature_lens=torch.tensor([len(matrix) for matrix in matrices]),
            tokens=torch.nn.utils.rnn.pad_sequence(tokens, True),
            token_lens=torch.tensor([len(ids) for ids in tokens]),
            ids=tuple(cut.id for cut in cuts),
            seconds=sum(cut.duration for cut in cuts),
            texts=tuple(text_of(cut) for cut in cuts),
        )


@dataclass(frozen=True)
class Shares:
    """How the batch of a step is dealt out, cut by cut.

    Attributes:
        count: of all shares.
        mine: those of this process, one after the other.
    """

    count: int = 1
    mine: tuple[int, ...] = (0,)


class _Batches(Dataset[Batch]):
    """One process's shares of some batches, padded as the whole batch: padding is heard."""

    def __init__(self, batches: list[Sequence[Cut]], shares: Shares, collate: Collator) -> None:
        self.batches, self.shares, self.collate = batches, shares, collate

    def __len__(self) -> int:
        return len(self.batches) * len(self.shares.mine)

    def __getitem__(self, index: int) -> Batch:
        number, position = divmod(index, len(self.shares.mine))
        cuts, share = self.batches[number], self.shares.mine[position]
        return self.collate(cuts[share :: self.shares.count], max(cut.num_frames for cut in cuts))


class TrainLoader:
    """Endless training batches, shuffled anew each epoch; resumes exactly.

    The order is a function of the cuts, the seconds of a step and the seed: runs that differ in
    their init alone see the same batches.  A step's batch has `batch_seconds` for each share, and
    one process with twice the seconds sees the same steps as two.
    """

    def __init__(
        self,
        cuts: Sequence[Cut],
        tokenizer: Tokenizer,
        batch_seconds: float,
        seed: int,
        shares: Shares = Shares(),
        workers: int = 0,
    ) -> None:
        """Keeps the cuts that can be trained on; says how many are left out and why.

        Args:
            cuts: with features; the order given does not matter.
            tokenizer: encodes their text.
            batch_seconds: audio in a share, padding included.
            seed: of the shuffles.
            shares: of a step's batch; those of this process are given out one after the other.
            workers: processes that load ahead.

        Raises:
            ValueError: no cut can be trained on.
        """
        usable = usable_cuts(sorted(cuts, key=lambda cut: cut.id), tokenizer)
        self._cuts = usable
        self._collate = Collator(tokenizer)
        self._step_seconds = batch_seconds * shares.count
        self._shares = shares
        self._workers = workers
        self._seed = seed
        self.epoch = 0
        self.batch = 0  # steps of the epoch already begun
        self.seconds = sum(cut.duration for cut in usable)

    def __iter__(self) -> Iterator[Batch]:
        """Goes on from `epoch` and `batch`, without end."""
        while True:
            batches = self._epoch_batches()
            dataset = _Batches(batches[self.batch :], self._shares, self._collate)
            loading = DataLoader(
                dataset,
                batch_size=None,
                num_workers=self._workers,
                pin_memory=torch.cuda.is_available(),
            )
            for number, batch in enumerate(loading):
                self.batch += number % len(self._shares.mine) == 0
                yield batch
            self.epoch, self.batch = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Where the loader is, for `load_state_dict`."""
        return {"epoch": self.epoch, "batch": self.batch, "shares": self._shares.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes back to a saved place; takes effect at the next `iter`.

        With another number of shares the batches are others, and the place is the nearest one.
        """
        self.epoch, self.batch = state["epoch"], state["batch"]
        before = state.get("shares", 1)
        if before != self._shares.count:
            self.batch = self.batch * before // self._shares.count
            log.warning(
                "steps had %d shares (processes x train.accumulate) and now have %d: the run goes "
                "on, with batches that an undisturbed one would not have had",
                before, self._shares.count,
            )  # fmt: skip

    def _epoch_batches(self) -> list[Sequence[Cut]]:
        cuts = CutSet.from_cuts(self._cuts)
        buckets = min(MAX_BUCKETS, int(self.seconds / self._step_seconds / BATCHES_PER_BUCKET))
        settings: dict[str, Any] = {
            "max_duration": max(self._step_seconds, max(cut.duration for cut in cuts)),
            "shuffle": True,
            "world_size": 1,
            "rank": 0,
        }
        sampler: BucketingSampler | SimpleCutSampler
        if buckets >= 2:
            # Not the dynamic one: it loses some cuts in every epoch.
            sampler = BucketingSampler(cuts, num_buckets=buckets, **settings)
        else:
            sampler = SimpleCutSampler(cuts, **settings)
        # The seed goes in by the epoch, because a bucket's own shuffle knows no other.
        sampler.set_epoch(self._seed * SEED_STRIDE + self.epoch)
        return [list(batch) for batch in sampler]


def dev_batches(cuts: Sequence[Cut], tokenizer: Tokenizer, batch_seconds: float) -> list[Batch]:
    """All batches of the dev cuts, in their order."""
    usable = usable_cuts(cuts, tokenizer)
    longest = max(cut.duration for cut in usable)
    sampler = SimpleCutSampler(
        CutSet.from_cuts(usable),
        max_duration=max(batch_seconds, longest),
        world_size=1,
        rank=0,
    )
    collate = Collator(tokenizer)
    return [collate(list(batch)) for batch in sampler]


def text_of(cut: Cut) -> str:
    """The cut's transcript."""
    return " ".join(supervision.text or "" for supervision in cut.supervisions)


def usable_cuts(cuts: Sequence[Cut], tokenizer: Tokenizer) -> list[Cut]:
    """The cuts that have text which fits their length; says how many are left out and why.

    Raises:
        ValueError: none is left.
    """
    usable, reasons, unknown = [], Counter[str](), Counter[str]()
    example: dict[str, str] = {}
    for cut in cuts:
        text = text_of(cut)
        tokens = tokenizer.encode(text)
        unknown.update(tokenizer.unknown_characters(text))
        if not tokens:
            reason = "an empty transcript"
        elif len(tokens) > encoder_frames(cut.num_frames):
            reason = "more tokens than encoder frames"
        else:
            usable.append(cut)
            continue
        reasons[reason] += 1
        example.setdefault(reason, cut.id)
    for reason, count in reasons.items():
        log.warning("left out %d cuts with %s, such as %s", count, reason, example[reason])
    if unknown:
        log.warning("characters outside the vocabulary, read as <unk>: %s", dict(unknown))
    if not usable:
        raise ValueError(f"none of the {len(cuts)} cuts can be trained on: {dict(reasons)}")
    return usable
