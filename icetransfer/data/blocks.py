"""An experiment's training cuts on disk, in blocks that fit into memory -> exp/train_data.

`block-00000.jsonl.gz` and so on are lhotse manifests, each sorted by name.  A cut's block depends
on its name alone, so that every block is a fair sample of the corpora, the speakers and the speeds.
Training reads one after the other, in an order of its own for each epoch, and forms its batches
within it: what it holds does not grow with the corpus, and to go on in the middle of an epoch it
reads one block, not the epoch.  A recipe of up to `BLOCK_CUTS` cuts is one block.

With train.mix the cuts of another recipe have blocks of their own, with the text that the tokens of
this one can write -> exp/mixed_data.

`index.json` holds a digest of each block.  One that does not have it any more is noticed when it is
read, and made again from the features' manifests.

With train.shar the blocks are a lhotse Shar besides: their features lie in the order of the
manifests, a tar file for each block that is read from its start to its end, also over a network.
"""

import gzip
import hashlib
import io
import itertools
import json
import os
import shlex
import shutil
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from lhotse import CutSet
from lhotse.cut import Cut, MonoCut
from lhotse.serialization import open_best
from lhotse.shar import SharWriter
from numpy.typing import NDArray

from icetransfer.data.jsonl import read_jsonl_gz, write_jsonl_gz
from icetransfer.data.subset import subset_path
from icetransfer.data.tokenizer import UNK_ID, Tokenizer
from icetransfer.data.utterances import text_of
from icetransfer.experiment import Experiment, log
from icetransfer.settings.tree import differences
from icetransfer.stage import atomic
from icetransfer.stage.json_file import read_json
from icetransfer.stage.stamp import sha256

BLOCK_CUTS = 20_000  # 50 MB in memory
SHAR_BLOCK_CUTS = 2_000  # with their features, 0.7 GB of 12-second cuts
SORTED_AT_ONCE = 10_000  # cuts of which the blocks are written together
FORMAT = 2  # of index.json; blocks of another one are made again, and compared
LINE = "line"  # of a manifest, in the custom fields of a cut that is not parsed yet


def encoder_frames(num_frames: int) -> int:
    """Encoder output frames (40 ms) of so many feature frames."""
    return ((num_frames - 7) // 2 + 1) // 2


@dataclass
class Screen:
    """Lets cuts pass whose text can be trained on, and counts the others by reason.

    Attributes:
        tokenizer: encodes their text.
        drops: what is dropped for a character outside the vocabulary, None for nothing.
        left_out: cuts, by reason.
        examples: the first cut of each reason.
        unknown: characters outside the vocabulary.
        longest: feature frames and tokens of the longest cut that passed.
        fullest: those of the one with most tokens for its frames.
    """

    tokenizer: Tokenizer
    drops: Literal["characters", "cuts"] | None = None
    left_out: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    unknown: Counter[str] = field(default_factory=Counter)
    longest: tuple[int, int] = (0, 0)
    fullest: tuple[int, int] = (1, 0)

    def text(self, cut_id: str, text: str, num_frames: int) -> str | None:
        """What a cut is trained on; None where that is nothing or does not fit its length."""
        tokens = self.tokenizer.encode(text)
        unknown = self.tokenizer.unknown_characters(text) if UNK_ID in tokens else ""
        self.unknown.update(unknown)
        if unknown and self.drops == "characters":
            text = " ".join(text.translate(dict.fromkeys(map(ord, unknown))).split())
            tokens = self.tokenizer.encode(text)
        if unknown and self.drops == "cuts":
            reason = "characters outside the vocabulary"
        elif not tokens:
            reason = "an empty transcript"
        elif len(tokens) > encoder_frames(num_frames):
            reason = "more tokens than encoder frames"
        else:
            size = num_frames, len(tokens)
            self.longest = max(self.longest, size)
            self.fullest = max(self.fullest, size, key=lambda found: found[1] / found[0])
            return text
        self.left_out[reason] += 1
        self.examples.setdefault(reason, cut_id)
        return None

    def messages(self) -> list[str]:
        """What was left out, and why."""
        lines = [
            f"left out {count} cuts with {reason}, such as {self.examples[reason]}"
            for reason, count in self.left_out.items()
        ]
        if self.unknown:
            fate = f"their {self.drops} left out" if self.drops else "read as <unk>"
            lines.append(f"characters outside the vocabulary, {fate}: {dict(self.unknown)}")
        return lines


@dataclass(frozen=True)
class Origin:
    """What blocks are made from.

    Attributes:
        folder: where they are put.
        manifests: of cuts with features, by corpus.
        tokens: the tokenizer's model.
        subset: the list of cuts to take; None for all.
        base: what paths in the manifests are relative to.
        unknown: what is dropped for a character that the tokens lack; None: it becomes `<unk>`.
    """

    folder: Path
    manifests: Mapping[str, Path]
    tokens: Path
    subset: Path | None = None
    base: Path = Path()
    unknown: Literal["characters", "cuts"] | None = None

    def digests(self) -> dict[str, str]:
        """The SHA-256 of all files that decide the blocks.

        Raises:
            ValueError: one of them does not exist.
        """
        paths = [*self.manifests.values(), self.tokens, *([self.subset] if self.subset else [])]
        for path in paths:
            if not path.is_file():
                raise ValueError(f"{path} does not exist: run stages 1 to 4, which make it")
        return {path.name: sha256(path) for path in paths}


@dataclass(frozen=True)
class Blocks:
    """Training cuts in blocks.

    Attributes:
        origin: what they were made from, and where they are.
        index: what index.json says of them.
        shar: the folder or the address with their features, None where the manifests say.
    """

    origin: Origin
    index: Mapping[str, Any]
    shar: str | None = None

    @property
    def count(self) -> int:
        """Of the blocks."""
        return len(self.index["blocks"])

    @property
    def cuts(self) -> int:
        """In all blocks."""
        return int(self.index["cuts"])

    @property
    def seconds(self) -> float:
        """Of audio in all blocks, at all speeds."""
        return float(self.index["seconds"])

    def read(self, number: int) -> list[Cut]:
        """The cuts of a block, by name; `parsed` makes whole ones of them.

        Their features are in memory when they come from a Shar.

        Raises:
            ValueError: the block is damaged and cannot be made again, or the Shar cannot be read.
        """
        packed = self._whole(number)
        if self.shar is None:
            with gzip.open(io.BytesIO(packed), "rt", encoding="utf-8") as lines:
                return [_outlined(line) for line in lines]
        features = _address(self.shar, f"features.{number:06d}.tar")
        manifest = _block_path(self.origin.folder, number)
        try:
            fields = {"cuts": [str(manifest)], "features": [features]}
            return list(CutSet.from_shar(fields=fields))
        except Exception as error:  # of the tar, the network, or lhotse's assertions
            raise ValueError(
                f"{features} does not hold the features of {manifest} ({error}): copy it again, or "
                f"remove it and the index.json beside it, and train again, which writes it"
            ) from error

    def _whole(self, number: int) -> bytes:
        """The content of a block's file, made again if it is not what it was."""
        path, digest = _block_path(self.origin.folder, number), self.index["blocks"][number]
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest() == digest:
            return content
        log.warning("%s is damaged: it is made again from the features' manifests", path)
        _make_again(self.origin, self.index, number)
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(
                f"{path} is damaged, and what is made of the same manifests is not what it was: "
                f"was icetransfer or zlib another version then? Use another --exp"
            )
        return content


def _outlined(line: str) -> Cut:
    """What batches are formed by of a line of a manifest; the rest stays text: it is faster."""
    facts = json.loads(line)
    custom = {LINE: line, "num_frames": facts["features"]["num_frames"]}
    return MonoCut(facts["id"], facts["start"], facts["duration"], 0, custom=custom)


def parsed(cut: Cut) -> Cut:
    """The whole cut of one that `Blocks.read` gave."""
    line = (cut.custom or {}).get(LINE)
    if line is None:
        return cut
    facts = json.loads(line)
    facts.pop("type")
    return MonoCut.from_dict(facts)


def num_frames(cut: Cut) -> int:
    """Feature frames of a cut, parsed or not."""
    return int(cut.num_frames or cut.custom["num_frames"])


def training_data(experiment: Experiment) -> Origin:
    """What an experiment is to learn."""
    manifests = {
        corpus: experiment.manifests_dir / f"{corpus}_train_fbank.jsonl.gz"
        for corpus in experiment.config.data.corpora
    }
    tokens = experiment.lang_dir / "bpe.model"
    return Origin(experiment.dir / "train_data", manifests, tokens, subset_path(experiment))


def mixed_data(experiment: Experiment) -> Origin | None:
    """What it is not to forget: the training data of another recipe, None for none.

    Raises:
        ValueError: that is no prepared data folder.
    """
    mix = experiment.config.train.mix
    if mix.data is None:
        return None
    saved = mix.data / "config.yaml"
    if not saved.is_file():
        raise ValueError(f"train.mix.data={mix.data}: no config.yaml there, so no data folder")
    # Paths in its manifests begin with what its own recipe calls it, as seen from that recipe.
    named = Path(yaml.safe_load(saved.read_text(encoding="utf-8"))["dir"])
    base = mix.data.absolute()
    for _ in () if named.is_absolute() else named.parts:
        base = base.parent
    suffix = "_train_fbank.jsonl.gz"
    found = sorted((mix.data / "manifests").glob(f"*{suffix}"))
    if not found:
        raise ValueError(f"train.mix.data={mix.data}: no features there: run its recipe's stage 2")
    manifests = {path.name.removesuffix(suffix): path for path in found}
    tokens = experiment.lang_dir / "bpe.model"
    folder = experiment.dir / "mixed_data"
    return Origin(folder, manifests, tokens, base=base, unknown=mix.unknown)


def hold_blocks(experiment: Experiment) -> None:
    """Makes the experiment's blocks, or checks that the data still are those that they hold.

    Raises:
        ValueError: cuts or tokens are not those of before, and says which differ; or none of the
            cuts can be trained on.
    """
    shar = experiment.config.train.shar
    main = training_data(experiment)
    index = _hold(experiment, main, BLOCK_CUTS if shar is None else SHAR_BLOCK_CUTS)
    if shar is not None:
        _hold_shar(main.folder, index, shar)
    if mixed := mixed_data(experiment):
        _hold(experiment, mixed, BLOCK_CUTS)


def open_blocks(origin: Origin, shar: str | None = None) -> Blocks:
    """The blocks that `hold_blocks` made.

    Raises:
        ValueError: they are not there any more.
    """
    index = _read_index(origin.folder)
    if index is None:
        raise ValueError(
            f"{origin.folder} is not there any more: run again from the start of training"
        )
    return Blocks(origin, index, shar)


def _hold(experiment: Experiment, origin: Origin, size: int) -> dict[str, Any]:
    folder = origin.folder
    sources, index = origin.digests(), _read_index(folder)
    if index is None:
        _make_blocks(origin, folder, sources, size)
    elif (index["sources"], index.get("format")) != (sources, FORMAT):
        fresh = folder.with_name(f"{folder.name}.new")
        _make_blocks(origin, fresh, sources, size)
        _refuse_changes(experiment, folder, fresh)
        shutil.rmtree(folder)
        fresh.rename(folder)
    index = _read_index(folder)
    assert index is not None
    for message in index["messages"]:
        log.warning("%s", message)
    return index


def _block_path(folder: Path, number: int) -> Path:
    return folder / f"block-{number:05d}.jsonl.gz"


def _read_index(folder: Path) -> dict[str, Any] | None:
    path = folder / "index.json"
    if not path.is_file():
        return None
    index: dict[str, Any] = read_json(path, ["sources", "blocks", "cuts", "seconds"])
    return index


def _count(index: Mapping[str, Any]) -> int:
    """The blocks that an index, of any format, is of."""
    blocks = index["blocks"]  # in the first format a number, now their digests
    return blocks if isinstance(blocks, int) else len(blocks)


def _make_blocks(origin: Origin, folder: Path, sources: dict[str, str], size: int) -> None:
    """Deals the cuts out to blocks of about so many; the index is written last."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    screen = Screen(Tokenizer(origin.tokens), origin.unknown)
    count = -(-sum(1 for _ in _cuts(origin)) // size)
    seen, cuts, seconds = 0, 0, 0.0
    dealt: dict[int, list[str]] = {}
    for cut in _cuts(origin):
        seen += 1
        frames = cut["features"]["num_frames"]
        text = screen.text(cut["id"], text_of(cut), frames)
        if text is None:
            continue
        if origin.unknown:
            cut["supervisions"] = [cut["supervisions"][0] | {"text": text}]
        line = json.dumps(_based(cut, origin.base), ensure_ascii=False) + "\n"
        dealt.setdefault(_digest(cut["id"]) % count, []).append(line)
        cuts += 1
        seconds += cut["duration"]
        if cuts % SORTED_AT_ONCE == 0:
            _append(folder, dealt)
    _append(folder, dealt)
    if not cuts:
        raise ValueError(f"none of the {seen} cuts can be trained on: {dict(screen.left_out)}")
    blocks: list[str] = []
    for part in sorted(folder.glob("block-*.jsonl")):  # a block may be empty, and is none then
        lines = map(json.loads, part.read_text(encoding="utf-8").splitlines())
        path = _block_path(folder, len(blocks))
        write_jsonl_gz(path, sorted(lines, key=lambda cut: cut["id"]))
        blocks.append(sha256(path))
        part.unlink()
    index = {
        "format": FORMAT, "size": size, "blocks": blocks, "cuts": cuts, "seconds": seconds,
        "sources": sources, "messages": screen.messages(),
        "longest": screen.longest, "fullest": screen.fullest,
    }  # fmt: skip
    atomic.write_text(folder / "index.json", json.dumps(index, indent=1) + "\n")


def _make_again(origin: Origin, index: Mapping[str, Any], number: int) -> None:
    """Makes all blocks again, which is the way to one, and puts one in its place.

    Every process that trains may do so at once, each in a folder of its own.

    Raises:
        ValueError: what they were made from is not there any more, or is not what it was.
    """
    path = _block_path(origin.folder, number)
    try:
        sources = origin.digests()
    except ValueError as error:
        raise ValueError(f"{path} is damaged and cannot be made again: {error}") from None
    if changed := [name for name, found in sources.items() if found != index["sources"].get(name)]:
        raise ValueError(
            f"{path} is damaged and cannot be made again, because {', '.join(changed)} changed "
            f"since: bring back what it was, or use another --exp"
        )
    host = socket.gethostname()
    fresh = origin.folder.with_name(f".{host}-{os.getpid()}.partial.{origin.folder.name}")
    try:
        _make_blocks(origin, fresh, sources, index["size"])
        _block_path(fresh, number).replace(path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _based(cut: dict[str, Any], base: Path) -> dict[str, Any]:
    """A manifest's cut with its paths seen from here."""
    if base != Path():
        # Features that are computed on the fly have no path.
        if path := cut["features"]["storage_path"]:
            cut["features"]["storage_path"] = str(base / path)
        for source in cut["recording"]["sources"]:
            source["source"] = str(base / source["source"])
    return cut


def _append(folder: Path, dealt: dict[int, list[str]]) -> None:
    for number, lines in dealt.items():
        with (folder / f"block-{number:05d}.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(lines)
    dealt.clear()


def _digest(name: str) -> int:
    """A number of 64 bits, by which a name is known: of millions, two are the same by no chance."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _subset_digests(path: Path) -> NDArray[np.uint64]:
    """The digests of a subset's lines, "corpus cut_id", in order: 8 bytes a cut."""
    with path.open(encoding="utf-8") as lines:
        digests = (_digest(line.rstrip("\n")) for line in lines)
        return np.sort(np.fromiter(digests, dtype=np.uint64))


def _cuts(origin: Origin) -> Iterator[dict[str, Any]]:
    """The cuts of the manifests that are in the subset, at every speed."""
    wanted = None if origin.subset is None else _subset_digests(origin.subset)
    for corpus, path in origin.manifests.items():
        cuts = read_jsonl_gz(path)
        if wanted is None:
            yield from cuts
            continue
        while some := list(itertools.islice(cuts, SORTED_AT_ONCE)):
            names = (f"{corpus} {cut['custom']['source_id']}" for cut in some)
            digests = np.fromiter(map(_digest, names), np.uint64, len(some))
            places = np.searchsorted(wanted, digests).clip(max=len(wanted) - 1)
            chosen = wanted[places] == digests
            yield from (cut for cut, is_chosen in zip(some, chosen, strict=True) if is_chosen)


def _refuse_changes(experiment: Experiment, old: Path, new: Path) -> None:
    """Raises ValueError when two folders of blocks are not the same to train on."""
    before, now = (_facts(folder) for folder in (old, new))
    changed = differences(before, now)
    if not changed:
        return
    shutil.rmtree(new)
    raise ValueError(
        f"{experiment.dir} was trained on other data than there are now; {len(changed)} cuts "
        f"differ (frames and text: before -> now), such as\n  "
        + "\n  ".join(changed[:5])
        + f"\nbring the data back, or train on these in an experiment of their own: the recipe's "
        f"run.sh with --exp {experiment.dir}-2"
    )


def _facts(folder: Path) -> dict[str, Any]:
    """What training sees of a folder of blocks: frames and text of each cut, and the tokens."""
    index = _read_index(folder)
    assert index is not None
    facts: dict[str, Any] = {
        cut["id"]: [cut["features"]["num_frames"], text_of(cut)]
        for number in range(_count(index))
        for cut in read_jsonl_gz(_block_path(folder, number))
    }
    return facts | {"bpe.model": index["sources"]["bpe.model"]}


def _address(shar: str, name: str) -> str:
    """A file of a Shar, as lhotse opens it: web addresses through curl, others as they are."""
    where = f"{shar.rstrip('/')}/{name}"
    if where.startswith(("http://", "https://")):
        return f"pipe:curl -fsSL --retry 5 {shlex.quote(where)}"
    return where


def _hold_shar(folder: Path, index: dict[str, Any], shar: str) -> None:
    """Writes the blocks' features to a Shar, or checks that the one there is of these blocks.

    A Shar at an address must be there: it is a copy of one that was written to a disk.

    Raises:
        ValueError: it is of other blocks, or cannot be read.
    """
    if "://" not in shar and not (Path(shar) / "index.json").is_file():
        count = _count(index)
        for number in range(count):
            _write_shard(folder, number, Path(shar))
            log.info("block %d of %d -> %s", number + 1, count, shar)
        atomic.write_text(Path(shar) / "index.json", json.dumps(index, indent=1) + "\n")
    try:
        with open_best(_address(shar, "index.json"), "r") as file:
            found = json.loads(file.read())
    except Exception as error:  # as lhotse's pipe raises it
        raise ValueError(
            f"train.shar={shar}: no index.json can be read there ({error}). Give a folder, train "
            f"one step, and copy the folder to that address"
        ) from error
    if found["sources"] != index["sources"]:
        raise ValueError(
            f"train.shar={shar} holds the features of other data than this experiment's: use "
            f"another folder, or remove it"
        )


def _write_shard(folder: Path, number: int, shar: Path) -> None:
    """Writes a block's features, in the order of its manifest, whole or not at all."""
    target = shar / f"features.{number:06d}.tar"
    if target.is_file():
        return
    partial = shar / f".{number:06d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fields = {"features": "numpy"}
    suffix = f".{number:06d}"
    with SharWriter(
        partial, fields, shard_size=None, shard_suffix=suffix, include_cuts=False,
        warn_unused_fields=False,
    ) as writer:  # fmt: skip
        for cut in CutSet.from_jsonl_lazy(_block_path(folder, number)):
            writer.write(cut)
    (partial / target.name).rename(target)
    shutil.rmtree(partial)
