"""Stage 3: 80-bin log-mel filter banks of every corpus and split, once per recipe.

`fbank` is the one place where audio becomes features, for training and decoding alike; its
settings are those of sherpa-onnx's streaming recogniser, so that a deployed model sees what it was
trained on.  Features are stored in half precision (about 0.004 in a log-mel of 10), in shards of
ten minutes of audio: a killed run keeps its finished shards.
"""

import functools
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ProcessPoolExecutor,
    as_completed,
    wait,
)
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import kaldi_native_fbank
import numpy as np
import torch
from lhotse import CutSet, Features, set_current_audio_backend
from lhotse.audio.backend import LibsndfileBackend
from lhotse.cut import Cut
from lhotse.features.base import FeatureExtractor, register_extractor
from lhotse.features.io import FeaturesReader, register_reader
from lhotse.utils import fastcopy
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from icetransfer import atomic
from icetransfer.data.jsonl import read_jsonl_gz, write_jsonl_gz
from icetransfer.experiment import Experiment, log, run_stage, sha256, write_provenance

SAMPLING_RATE = 16000
NUM_BINS = 80
FRAME_SHIFT = 0.01  # seconds
PADDING = float(np.log(1e-10))  # what absent frames are filled with
SHARD_SECONDS = 600
SHARDS_AHEAD = 4  # read and waiting, for each process
SPLITS = ("train", "dev", "test")


def fbank_options() -> Any:
    """Kaldi's filter banks as sherpa-onnx sets them (a `kaldi_native_fbank.FbankOptions`)."""
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq = SAMPLING_RATE
    options.frame_opts.dither = 0
    options.frame_opts.snip_edges = False
    options.mel_opts.num_bins = NUM_BINS
    options.mel_opts.low_freq = 20
    options.mel_opts.high_freq = -400  # below the Nyquist frequency
    return options


def fbank(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-mel filter banks of a whole recording.

    Args:
        samples: mono audio in [-1, 1], 16 kHz, of at least 80 samples.

    Returns:
        (T, 80), one frame for each 10 ms.

    Raises:
        ValueError: the audio is not one channel, or too short for one frame.
    """
    if samples.ndim != 1 or len(samples) < SAMPLING_RATE * FRAME_SHIFT / 2:
        raise ValueError(f"expected one channel of at least 5 ms, got an array {samples.shape}")
    extractor = kaldi_native_fbank.OnlineFbank(fbank_options())
    extractor.accept_waveform(SAMPLING_RATE, samples.tolist())  # a list: converted 1.5x faster
    extractor.input_finished()
    return np.stack([extractor.get_frame(i) for i in range(extractor.num_frames_ready)])


@dataclass
class StreamingFbankConfig:
    """The part of the settings that a manifest records."""

    num_filters: int = NUM_BINS
    low_freq: float = 20
    high_freq: float = -400
    frame_shift: float = FRAME_SHIFT


@register_extractor
class StreamingFbank(FeatureExtractor):  # type: ignore[misc]  # lhotse is untyped
    """`fbank` as a lhotse extractor."""

    name = "icetransfer-fbank"
    config_type = StreamingFbankConfig

    @property
    def frame_shift(self) -> float:
        """Seconds between frames."""
        return FRAME_SHIFT

    def feature_dim(self, sampling_rate: int) -> int:
        """The number of mel bins."""
        return NUM_BINS

    def to_dict(self) -> dict[str, Any]:
        """The settings, as lhotse stores them."""
        return asdict(self.config) | {"feature_type": self.name}

    def extract(self, samples: Any, sampling_rate: int) -> NDArray[np.float32]:
        """Features (T, 80) of samples (num_samples,) or (1, num_samples)."""
        if sampling_rate != SAMPLING_RATE:
            raise ValueError(f"expected audio at {SAMPLING_RATE} Hz, got {sampling_rate} Hz")
        return fbank(np.asarray(samples, dtype=np.float32).squeeze(0 if samples.ndim == 2 else ()))


@functools.lru_cache(maxsize=4096)
def _open_shard(path: str) -> NDArray[np.float16]:
    shard: NDArray[np.float16] = np.load(path, mmap_mode="r")
    return shard


@register_reader
class ShardReader(FeaturesReader):  # type: ignore[misc]
    """Reads a cut's rows from a shard, one array of many cuts' frames; the key is "first:last"."""

    name = "icetransfer-shard"

    def __init__(self, storage_path: str) -> None:
        self.storage_path = storage_path

    def read(
        self, key: str, left_offset_frames: int = 0, right_offset_frames: int | None = None
    ) -> NDArray[np.float32]:
        """Frames (T, 80) of the cut stored under `key`, or a part of them."""
        first, last = (int(row) for row in key.split(":"))
        rows = _open_shard(str(self.storage_path))[first:last]
        return rows[left_offset_frames:right_offset_frames].astype(np.float32)


def read_manifest(path: Path) -> list[Cut]:
    """The cuts of a manifest; an empty file is no cuts.

    Raises:
        ValueError: the file does not exist.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: run the recipe's earlier stages, which make it")
    return list(CutSet.from_jsonl_lazy(path))


def write_manifest(cuts: list[Cut], path: Path) -> None:
    """Writes cuts to a .jsonl.gz manifest, whole or not at all, with the same bytes each time."""
    write_jsonl_gz(path, (cut.to_dict() for cut in cuts))


def _shards(cuts: Iterable[Cut]) -> Iterator[list[Cut]]:
    shard: list[Cut] = []
    seconds = 0.0
    for cut in cuts:
        shard.append(cut)
        seconds += cut.duration
        if seconds >= SHARD_SECONDS:
            yield shard
            shard, seconds = [], 0.0
    if shard:
        yield shard


def _perturbed(cut: Cut, speed: float) -> Cut:
    """A copy of the cut at another speed; `source_id` keeps the name that it came from."""
    copy = fastcopy(cut) if speed == 1 else cut.perturb_speed(speed)
    copy.custom = (cut.custom or {}) | {"source_id": cut.id}
    return copy


def compute_shard(cuts: list[Cut], speed: float, stem: Path) -> list[str]:
    """Writes the features of some cuts to `stem`.npy and, last, their manifest `stem`.jsonl.gz.

    Args:
        cuts: cuts of one recording each.
        speed: factor of speed perturbation, 1 for none.
        stem: path without suffix.

    Returns:
        A message for each recording that could not be read; the others are written.
    """
    extractor = StreamingFbank()
    arrays, kept, problems, row = [], [], [], 0
    for cut in cuts:
        copy = _perturbed(cut, speed)
        try:
            features = extractor.extract(copy.load_audio(), copy.sampling_rate)
        except Exception as error:  # whatever a decoder raises on a broken file
            source = cut.recording.sources[0].source
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
            problems.append(f"cut {cut.id}: {source} cannot be read, left out ({reason})")
            continue
        copy.features = Features(
            type=extractor.name,
            num_frames=len(features),
            num_features=NUM_BINS,
            frame_shift=FRAME_SHIFT,
            sampling_rate=SAMPLING_RATE,
            start=copy.start,
            duration=copy.duration,
            storage_type=ShardReader.name,
            storage_path=str(stem.with_name(stem.name + ".npy")),
            storage_key=f"{row}:{row + len(features)}",
            recording_id=copy.recording.id,
            channels=copy.channel,
        )
        arrays.append(features.astype(np.float16))
        kept.append(copy)
        row += len(features)
    with atomic.atomic_path(stem.with_name(stem.name + ".npy")) as temporary:
        np.save(temporary, np.concatenate(arrays) if arrays else np.zeros((0, NUM_BINS), "f2"))
    write_manifest(kept, stem.with_name(stem.name + ".jsonl.gz"))
    return problems


def _start_worker() -> None:
    torch.set_num_threads(1)
    set_current_audio_backend(LibsndfileBackend())


def compute_split(experiment: Experiment, corpus: str, split: str) -> None:
    """Computes one split of one corpus, unless that is done.

    The manifest is read shard by shard, so that memory does not grow with the corpus.

    Raises:
        ValueError: there is no manifest, or none of its recordings can be read.
    """
    source = experiment.manifests_dir / f"{corpus}_{split}.jsonl.gz"
    target = experiment.manifests_dir / f"{corpus}_{split}_fbank.jsonl.gz"
    folder = experiment.data_dir / "fbank" / f"{corpus}_{split}"
    _forget_features_of_another(source, target, folder)
    if target.is_file():
        log.info("skip: %s is complete", target)
        return
    settings = experiment.config.data.features
    speeds = settings.speeds if split == "train" else (1.0,)
    cuts, seconds = 0, 0.0
    for cut in read_jsonl_gz(source):
        cuts += 1
        seconds += cut["duration"]
    work = (
        (shard, speed, folder / f"speed-{speed:g}-{number:05d}")
        for speed in speeds
        for number, shard in enumerate(_shards(CutSet.from_jsonl_lazy(source) if cuts else ()))
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        name = f"{corpus} {split}: features, minutes of audio"
        bar = progress.add_task(name, total=int(len(speeds) * seconds / 60))
        manifests, problems = _compute_shards(
            work, settings.jobs, lambda minutes: progress.advance(bar, minutes)
        )
    for problem in sorted(problems):
        log.warning("%s", problem)
    if cuts and not any(next(read_jsonl_gz(manifest), None) for manifest in manifests):
        raise ValueError(f"{corpus} {split}: none of its {cuts} recordings can be read")
    kept = write_jsonl_gz(
        target, (cut for manifest in manifests for cut in read_jsonl_gz(manifest))
    )
    log.info("%s %s: %d of %d cuts -> %s", corpus, split, kept, cuts * len(speeds), target)


def _forget_features_of_another(source: Path, target: Path, folder: Path) -> None:
    """Removes features that were computed from another manifest than the one that is there now."""
    if not source.is_file():
        raise ValueError(f"{source} does not exist: run the recipe's earlier stages, which make it")
    record = folder / "source.sha256"
    digest = sha256(source)
    if record.is_file() and record.read_text(encoding="utf-8") != digest:
        log.info("%s has changed: its features are computed anew", source)
        target.unlink(missing_ok=True)
        shutil.rmtree(folder)
    atomic.write_text(record, digest)


def _compute_shards(
    work: Iterable[tuple[list[Cut], float, Path]], jobs: int, done: Callable[[float], None]
) -> tuple[list[Path], list[str]]:
    """Computes the shards that are missing, in several processes, a few shards ahead.

    Args:
        work: the cuts, the speed and the stem of each shard.
        jobs: processes.
        done: is told the minutes of audio of each finished shard.

    Returns:
        The manifests of all shards, and a message for each recording that could not be read.
    """
    manifests: list[Path] = []
    problems: list[str] = []
    running: dict[Future[list[str]], float] = {}
    with ProcessPoolExecutor(jobs, initializer=_start_worker) as pool:
        for shard, speed, stem in work:
            manifests.append(stem.with_name(stem.name + ".jsonl.gz"))
            minutes = sum(cut.duration for cut in shard) / 60
            if manifests[-1].is_file():
                done(minutes)
                continue
            running[pool.submit(compute_shard, shard, speed, stem)] = minutes
            if len(running) > SHARDS_AHEAD * jobs:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    problems += future.result()
                    done(running.pop(future))
        for future in as_completed(running):
            problems += future.result()
            done(running[future])
    return manifests, problems


def compute_features(experiment: Experiment) -> None:
    """Computes what is missing of every corpus and split."""
    for corpus in experiment.config.data.corpora:
        for split in SPLITS:
            compute_split(experiment, corpus, split)
    write_provenance(experiment, "features", fbank=asdict(StreamingFbankConfig()))


if __name__ == "__main__":
    run_stage(__doc__, compute_features)
