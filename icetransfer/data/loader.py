"""Batches of training features and tokens, in an order that only the data and the seed decide.

Legend: N batch, T feature frames (10 ms), S tokens.
"""

import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.dataset.sampling import BucketingSampler, SimpleCutSampler
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from icetransfer.data.blocks import (
    Blocks,
    Screen,
    mixed_data,
    num_frames,
    open_blocks,
    parsed,
    training_data,
)
from icetransfer.data.features import FRAME_SHIFT, PADDING, load_features, read_manifest
from icetransfer.data.shards import NUM_BINS
from icetransfer.data.subset import order_key
from icetransfer.data.surroundings import Augmenter
from icetransfer.data.tokenizer import Tokenizer
from icetransfer.experiment import Experiment, log

MAX_BUCKETS = 30
BATCHES_PER_BUCKET = 5  # fewer than this in an epoch, and buckets would leave mostly stumps
LOST_IN_A_ROW = 100  # so many cuts cannot be read, and training stops
SEED_STRIDE = 100_000  # seeds stay apart for so many epochs


@dataclass(frozen=True)
class Batch:
    """One batch; lengths and token arrays are int64.

    Attributes:
        features: (N, T, 80) float32, padded with log(1e-10).
        feature_lens: (N,).
        tokens: (N, S), padded with 0.
        token_lens: (N,).
        ids: names of the N cuts; where cuts are joined to a row, with + between them.
        seconds: audio in the batch, padding not counted.
        texts: transcripts of the N cuts.
        missing: names of cuts whose features cannot be read, and why; they are not among the N.
    """

    features: Tensor
    feature_lens: Tensor
    tokens: Tensor
    token_lens: Tensor
    ids: tuple[str, ...]
    seconds: float
    texts: tuple[str, ...] = ()
    missing: tuple[tuple[str, str], ...] = ()

    def to(self, device: torch.device) -> "Batch":
        """The batch with features and tokens on the device.

        Lengths stay on the host, where shapes are decided: to ask a GPU for them is to wait for it.
        """
        return replace(
            self,
            features=self.features.to(device, non_blocking=True),
            tokens=self.tokens.to(device, non_blocking=True),
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


@dataclass(frozen=True)
class Row:
    """What becomes one row of a batch.

    Attributes:
        cuts: one, or several that are joined.
        epoch: in which pass over the data; decides how cuts are augmented.
        pauses: feature frames that augmentation adds to them.
    """

    cuts: tuple[Cut, ...]
    epoch: int = 0
    pauses: int = 0

    @property
    def num_frames(self) -> int:
        """Feature frames."""
        return self.pauses + sum(map(num_frames, self.cuts))


class Collator:
    """Turns rows of cuts into a `Batch`."""

    def __init__(self, tokenizer: Tokenizer, augmenter: Augmenter | None = None) -> None:
        """Remembers what to encode text with, and what is done to the cuts if anything."""
        self.tokenizer, self.augmenter = tokenizer, augmenter

    def __call__(self, rows: Sequence[Row], frames: int = 0) -> Batch:
        """Loads the features and encodes the text of some rows.

        Args:
            rows: may be none.
            frames: how far to pad at least.
        """
        loaded = [[self._load(cut, row.epoch) for cut in row.cuts] for row in rows]
        found = [[each for each in row if not isinstance(each, _Missing)] for row in loaded]
        missing = [each for row in loaded for each in row if isinstance(each, _Missing)]
        found = [row for row in found if row]
        lost = tuple((each.id, each.reason) for each in missing)
        if not found:
            none = torch.zeros(0, dtype=torch.long)
            features = torch.zeros(0, frames, NUM_BINS)
            return Batch(features, none, none.view(0, 0), none, (), 0.0, missing=lost)
        matrices = [torch.cat([torch.from_numpy(each.features) for each in row]) for row in found]
        padded = torch.nn.utils.rnn.pad_sequence(matrices, True, padding_value=PADDING)
        texts = [" ".join(text_of(each.cut) for each in row) for row in found]
        tokens = [torch.tensor(self.tokenizer.encode(text), dtype=torch.long) for text in texts]
        return Batch(
            features=torch.nn.functional.pad(
                padded, (0, 0, 0, max(0, frames - padded.size(1))), value=PADDING
            ),
            feature_lens=torch.tensor([len(matrix) for matrix in matrices]),
            tokens=torch.nn.utils.rnn.pad_sequence(tokens, True),
            token_lens=torch.tensor([len(ids) for ids in tokens]),
            ids=tuple("+".join(each.cut.id for each in row) for row in found),
            seconds=sum(each.cut.duration for row in found for each in row),
            texts=tuple(texts),
            missing=lost,
        )

    def _load(self, cut: Cut, epoch: int) -> "_Loaded | _Missing":
        cut = parsed(cut)
        try:
            if self.augmenter is None:
                return _Loaded(cut, load_features(cut))
            return _Loaded(cut, self.augmenter.load(cut, _key(epoch, cut)))
        except ValueError as error:
            return _Missing(cut.id, str(error))


def _key(epoch: int, cut: Cut) -> str:
    """What decides, with the seed, how a cut is augmented."""
    return f"{epoch} {cut.id}"


@dataclass(frozen=True)
class _Loaded:
    cut: Cut
    features: NDArray[np.float32]


@dataclass(frozen=True)
class _Missing:
    id: str
    reason: str


@dataclass(frozen=True)
class Shares:
    """How the batch of a step is dealt out, row by row.

    Attributes:
        count: of all shares.
        mine: those of this process, one after the other.
    """

    count: int = 1
    mine: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Place:
    """Where training is in its data.

    Attributes:
        epoch: passes over all blocks that are done.
        block: blocks of this pass that are done.
        batch: steps begun in the block after these.
    """

    epoch: int = 0
    block: int = 0
    batch: int = 0


class Order:
    """Which cuts are trained on at which step: a function of blocks, seconds and seed."""

    def __init__(
        self,
        blocks: Blocks,
        seconds: float,
        seed: int,
        join_seconds: float = 0,
        augmenter: Augmenter | None = None,
    ) -> None:
        """Defines an order.

        Args:
            blocks: the cuts.
            seconds: audio of a step, padding and the augmenter's pauses included.
            seed: of the shuffles.
            join_seconds: cuts of a step are joined, one after the other, to rows of so much audio.
            augmenter: what makes cuts longer, if anything.
        """
        self.blocks, self._seconds, self._seed = blocks, seconds, seed
        self._join_seconds, self._augmenter = join_seconds, augmenter

    def steps(self, place: Place) -> Iterator[tuple[Place, list[Row]]]:
        """The rows of each step from a place on, without end, and the place after it."""
        epoch, done, batch = place.epoch, place.block, place.batch
        while True:
            numbers = list(range(self.blocks.count))
            random.Random(f"blocks {self._seed} {epoch}").shuffle(numbers)
            for position in range(done, len(numbers)):
                batches = self._batches(self.blocks.read(numbers[position]), epoch)
                for index in range(batch, len(batches)):
                    yield Place(epoch, position, index + 1), self._rows(batches[index], epoch)
                batch = 0
            epoch, done = epoch + 1, 0

    def _rows(self, cuts: Sequence[Cut], epoch: int) -> list[Row]:
        rows: list[list[Cut]] = []
        seconds = 0.0
        for cut in cuts:
            if not rows or seconds + cut.duration > self._join_seconds:
                rows.append([])
                seconds = 0.0
            rows[-1].append(cut)
            seconds += cut.duration
        return [
            Row(tuple(row), epoch, sum(self._pauses(cut, epoch) for cut in row)) for row in rows
        ]

    def _pauses(self, cut: Cut, epoch: int) -> int:
        """Frames that augmentation adds to a cut."""
        return 0 if self._augmenter is None else self._augmenter.pauses(_key(epoch, cut))

    def _batches(self, cuts: list[Cut], epoch: int) -> list[Sequence[Cut]]:
        """The steps of one block, of cuts of similar length where there are enough of them."""
        seconds = sum(cut.duration for cut in cuts)
        buckets = min(MAX_BUCKETS, int(seconds / self._seconds / BATCHES_PER_BUCKET))
        # Pauses are part of a step's audio, so that they make no step dearer on average.
        pauses = FRAME_SHIFT * sum(self._pauses(cut, epoch) for cut in cuts)
        speech = self._seconds * seconds / (seconds + pauses)
        settings: dict[str, Any] = {
            "max_duration": max(speech, max(cut.duration for cut in cuts)),
            "shuffle": True,
            "world_size": 1,
            "rank": 0,
        }
        sampler: BucketingSampler | SimpleCutSampler
        if buckets >= 2:
            # Not the dynamic one: it loses some cuts in every epoch.
            sampler = BucketingSampler(CutSet.from_cuts(cuts), num_buckets=buckets, **settings)
        else:
            sampler = SimpleCutSampler(CutSet.from_cuts(cuts), **settings)
        # The seed goes in by the epoch, because a bucket's own shuffle knows no other.
        sampler.set_epoch(self._seed * SEED_STRIDE + epoch)
        return [list(batch) for batch in sampler]


class _Loading(Dataset[Batch]):
    """Loads what the sampler asks for: a share's rows, padded as the whole batch is heard."""

    def __init__(self, collate: Collator) -> None:
        self._collate = collate

    def __getitem__(self, share: tuple[list[Row], int]) -> Batch:
        return self._collate(*share)


class TrainLoader:
    """Endless training batches, shuffled anew each epoch; resumes exactly.

    The order is a function of the cuts, the seconds of a step and the seed: runs that differ in
    their init alone see the same batches.  A step's batch has `batch_seconds` for each share, and
    one process with twice the seconds sees the same steps as two.
    """

    def __init__(
        self,
        orders: Sequence[Order],
        collate: Collator,
        shares: Shares = Shares(),
        workers: int = 0,
    ) -> None:
        """Starts at the beginning.

        Args:
            orders: a step has the rows of one step of each; the first one's epochs are the run's.
            collate: makes batches of them.
            shares: of a step's batch; those of this process are given out one after the other.
            workers: processes that load ahead.
        """
        self._orders = orders
        self._collate = collate
        self._shares = shares
        self._workers = workers
        self._places = [Place() for _ in orders]  # after the steps already begun

    @property
    def epoch(self) -> int:
        """Of the step that was given out last."""
        return self._places[0].epoch

    @property
    def seconds(self) -> float:
        """Audio of an epoch, at all speeds."""
        return self._orders[0].blocks.seconds

    def __iter__(self) -> Iterator[Batch]:
        """Goes on from where it is, without end.

        Raises:
            ValueError: the features of many cuts in a row cannot be read.
        """
        ahead: deque[list[Place]] = deque()  # of the steps that are being loaded

        def shares() -> Iterator[tuple[list[Row], int]]:
            steps = [
                order.steps(place) for order, place in zip(self._orders, self._places, strict=True)
            ]
            for parts in zip(*steps, strict=True):
                ahead.append([place for place, _ in parts])
                rows = [row for _, rows in parts for row in rows]
                frames = max(row.num_frames for row in rows)
                for share in self._shares.mine:
                    yield rows[share :: self._shares.count], frames

        loading = DataLoader(
            _Loading(self._collate),
            batch_size=None,
            sampler=shares(),
            num_workers=self._workers,
            pin_memory=torch.cuda.is_available(),
        )
        lost = 0  # cuts, without one in between that was there
        for number, batch in enumerate(loading):
            lost = 0 if batch.ids else lost + len(batch.missing)
            if lost >= LOST_IN_A_ROW:
                reason = batch.missing[0][1]
                raise ValueError(f"{reason}. So it is with the last {lost} cuts: is a disk gone?")
            if number % len(self._shares.mine) == 0:
                self._places = ahead.popleft()
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, for `load_state_dict`."""
        places = [asdict(place) for place in self._places]
        return {"places": places, "shares": self._shares.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to a saved place; takes effect at the next `iter`.

        With another number of shares the batches are others, and the place is the nearest one.
        """
        # Earlier versions had one place, in one block.
        places = state.get("places") or [{key: state[key] for key in ("epoch", "batch")}]
        self._places = [Place(**place) for place in places]
        before = state.get("shares", 1)
        if before != self._shares.count:
            self._places = [
                replace(place, batch=place.batch * before // self._shares.count)
                for place in self._places
            ]
            log.warning(
                "steps had %d shares (processes x train.accumulate) and now have %d: the run goes "
                "on, with batches that an undisturbed one would not have had",
                before, self._shares.count,
            )  # fmt: skip


def train_loader(
    experiment: Experiment, tokenizer: Tokenizer, shares: Shares = Shares()
) -> TrainLoader:
    """The loader of an experiment's blocks, as its config wants it."""
    settings = experiment.config.train
    assert settings.batch_seconds is not None, "settled when the run begins"
    augmenter = Augmenter(settings.augment, experiment.config.seed) if settings.augment else None
    origins = [(training_data(experiment), settings.shar, 1.0)]
    if mixed := mixed_data(experiment):
        share = settings.mix.share
        origins = [(origins[0][0], settings.shar, 1 - share), (mixed, None, share)]
    orders = [
        Order(
            open_blocks(origin, shar),
            settings.batch_seconds * shares.count * share,
            experiment.config.seed,
            settings.join_seconds,
            augmenter,
        )
        for origin, shar, share in origins
    ]
    return TrainLoader(orders, Collator(tokenizer, augmenter), shares, settings.workers)


def dev_batches(cuts: Sequence[Cut], tokenizer: Tokenizer, batch_seconds: float) -> list[Batch]:
    """All batches of the dev cuts, in their order.

    Raises:
        ValueError: none of them has text that fits its length, or features cannot be read.
    """
    screen = Screen(tokenizer)
    usable = [cut for cut in cuts if screen.text(cut.id, text_of(cut), cut.num_frames)]
    for message in screen.messages():
        log.warning("dev: %s", message)
    if not cuts:
        raise ValueError(
            "no corpus has a dev recording of at most data.max_seconds: training needs some, to "
            "see what it does not learn from; a folder's come from its holdout_every"
        )
    if not usable:
        raise ValueError(f"none of the {len(cuts)} dev cuts can be used: {dict(screen.left_out)}")
    longest = max(cut.duration for cut in usable)
    sampler = SimpleCutSampler(
        CutSet.from_cuts(usable),
        max_duration=max(batch_seconds, longest),
        world_size=1,
        rank=0,
    )
    collate = Collator(tokenizer)
    batches = [collate([Row((cut,)) for cut in batch]) for batch in sampler]
    for _, reason in (each for batch in batches for each in batch.missing):
        raise ValueError(reason)  # a dev set must stay the same
    return batches


def text_of(cut: Cut) -> str:
    """The cut's transcript."""
    return " ".join(supervision.text or "" for supervision in cut.supervisions)
