"""Stage 2: 80-bin log-mel filter banks of every corpus and split, once per recipe.

`fbank` is the one place where audio becomes features, for training and decoding alike; its
settings are those of sherpa-onnx's streaming recogniser, so that a deployed model sees what it was
trained on.  Features are stored in half precision (about 0.004 in a log-mel of 10), in shards of
ten minutes of audio: a killed run keeps its finished shards, and with --share several processes, on
one host or more, each compute a share of them.

With data.features.store=on_the_fly nothing is computed here: the manifests say how many frames each
cut will have, and whoever loads a batch calls `compute`.
"""

import multiprocessing
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
from lhotse.utils import compute_num_frames, fastcopy
from numpy.typing import NDArray

from icetransfer import config
from icetransfer.data.jsonl import join_jsonl_gz, read_jsonl_gz, write_jsonl_gz
from icetransfer.data.shards import NUM_BINS, ShardReader, is_whole, write_shard
from icetransfer.data.utterances import SAMPLING_RATE, SPLITS
from icetransfer.experiment import Experiment, log, run_stage_in_shares, write_provenance
from icetransfer.stage import atomic
from icetransfer.stage.lock import claimed, locked
from icetransfer.stage.parent import work_for_parent
from icetransfer.stage.progress import minutes_of, progress_bar
from icetransfer.stage.share import ALL, Share
from icetransfer.stage.stamp import sha256

FORMAT = 1  # of the features; what was computed in another is computed anew
FRAME_SHIFT = 0.01  # seconds
SHORTEST = 80  # samples of one frame
PADDING = float(np.log(1e-10))  # what absent frames are filled with
FLOOR = float(np.log(np.finfo(np.float32).eps))  # what digital silence is: the least there is
SHARD_SECONDS = 600
SHARDS_AHEAD = 4  # read and waiting, for each process
ON_THE_FLY = "icetransfer-on-the-fly"  # the storage type of features that are stored nowhere


def fbank_options(library: Any = kaldi_native_fbank) -> Any:
    """Kaldi's filter banks as sherpa-onnx sets them: the `FbankOptions` of a library."""
    options = library.FbankOptions()
    options.frame_opts.samp_freq = SAMPLING_RATE
    options.frame_opts.dither = 0
    options.frame_opts.snip_edges = False
    options.mel_opts.num_bins = NUM_BINS
    options.mel_opts.low_freq = 20
    options.mel_opts.high_freq = -400  # below the Nyquist frequency
    return options


Extractor = Callable[[list[NDArray[np.float32]]], list[NDArray[np.float32]]]


def make_extractor(name: str) -> Extractor:
    """What computes the features of a list of recordings: `fbank`, or the same on a GPU.

    Args:
        name: "kaldi_native_fbank" or "kaldifeat".

    Raises:
        ValueError: kaldifeat is not installed.
    """
    if name == "kaldi_native_fbank":
        return lambda waves: [fbank(wave) for wave in waves]
    try:
        import kaldifeat
    except ImportError as error:
        raise ValueError(
            f"data.features.extractor=kaldifeat, which cannot be imported ({error}): install the "
            f"build for your torch and CUDA from https://csukuangfj.github.io/kaldifeat (the one "
            f"on the Python package index does not install), or use kaldi_native_fbank"
        ) from None
    options = fbank_options(kaldifeat)
    options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compute_batch = kaldifeat.Fbank(options)

    def extract(waves: list[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        tensors = [torch.from_numpy(wave).to(options.device) for wave in waves]
        return [matrix.cpu().numpy() for matrix in compute_batch(tensors)] if tensors else []

    return extract


def fbank(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-mel filter banks of a whole recording.

    Args:
        samples: mono audio in [-1, 1], 16 kHz, of at least 80 samples.

    Returns:
        (T, 80), one frame for each 10 ms.

    Raises:
        ValueError: the audio is not one channel, or too short for one frame.
    """
    if samples.ndim != 1 or len(samples) < SHORTEST:
        raise ValueError(f"expected one channel of at least 5 ms, got an array {samples.shape}")
    extractor = kaldi_native_fbank.OnlineFbank(fbank_options())
    # The array's buffer: converting its numbers from a list takes half as long again.
    extractor.accept_waveform(SAMPLING_RATE, np.ascontiguousarray(samples).data)
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
    """`fbank` as a lhotse extractor: what lhotse asks when it mixes or pads stored features."""

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


def read_audio(cut: Cut) -> NDArray[np.float32]:
    """The cut's samples, resampled and perturbed as its recording says.

    Returns:
        (num_samples,) in [-1, 1], 16 kHz.

    Raises:
        ValueError: the audio cannot be used; names the cut and its file.
    """
    set_current_audio_backend(LibsndfileBackend())
    try:
        samples: NDArray[np.float32] = cut.load_audio()
    except Exception as error:  # whatever a decoder raises on a broken file
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
        raise ValueError(
            f"cut {cut.id}: {cut.recording.sources[0].source} cannot be read ({reason})"
        ) from error
    if cut.sampling_rate != SAMPLING_RATE or len(samples) != 1 or samples.shape[1] < SHORTEST:
        raise ValueError(
            f"cut {cut.id}: {cut.recording.sources[0].source} gives {samples.shape} samples at "
            f"{cut.sampling_rate} Hz, expected one channel of at least 5 ms at {SAMPLING_RATE} Hz"
        )
    wave: NDArray[np.float32] = samples[0]
    if not np.isfinite(wave).all():
        raise ValueError(
            f"cut {cut.id}: {cut.recording.sources[0].source} has samples that are not finite (NaN "
            f"or infinity), though stage 1 found none: was it replaced? Run stage 1 again"
        )
    return wave


def compute(cut: Cut) -> NDArray[np.float32]:
    """The cut's features, computed from its audio now.

    Returns:
        (T, 80) in full precision; T is the cut's num_frames.

    Raises:
        ValueError: the audio cannot be read.
    """
    return fbank(read_audio(cut))


def is_on_the_fly(cut: Cut) -> bool:
    """Whether the cut's features are to be computed whenever they are needed."""
    return bool(cut.features.storage_type == ON_THE_FLY)


def load_features(cut: Cut) -> NDArray[np.float32]:
    """The cut's features, (T, 80) float32.

    Raises:
        ValueError: they cannot be read or computed, or are not as long as the manifest says.
    """
    if is_on_the_fly(cut):
        return compute(cut)
    try:
        features: NDArray[np.float32] = cut.load_features()
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"cut {cut.id}: its features in {cut.features.storage_path} cannot be read ({reason}). "
            f"Bring the file back, or run stage 2 again, which makes it; training then goes on "
            f"from its last checkpoint"
        ) from error
    if features.shape[0] != cut.num_frames:
        raise ValueError(
            f"cut {cut.id}: {cut.features.storage_path} holds {features.shape[0]} frames of it, "
            f"its manifest says {cut.num_frames}: run stage 2 again"
        )
    return features


def read_manifest(path: Path) -> list[Cut]:
    """The cuts of a manifest; an empty file is no cuts.

    Raises:
        ValueError: the file does not exist, or is damaged.
    """
    return list(CutSet.from_dicts(read_jsonl_gz(path)))


def write_manifest(cuts: list[Cut], path: Path) -> None:
    """Writes cuts to a .jsonl.gz manifest, whole or not at all, with the same bytes each time."""
    write_jsonl_gz(path, (cut.to_dict() for cut in cuts))


@dataclass(frozen=True)
class Shard:
    """Cuts whose features are computed and stored together.

    Attributes:
        number: of the split's shards at one speed, from 0.
        speed: factor of speed perturbation, 1 for none.
        cuts: as they stand in the manifest of stage 1.
        stem: path of its files, without suffix.
    """

    number: int
    speed: float
    cuts: list[dict[str, Any]]
    stem: Path

    @property
    def manifest(self) -> Path:
        """What is written last."""
        return self.stem.with_name(self.stem.name + ".jsonl.gz")

    @property
    def minutes(self) -> float:
        """Of audio, before speed perturbation."""
        seconds: float = sum(cut["duration"] for cut in self.cuts)
        return seconds / 60


def _shards(source: Path, speeds: Iterable[float], folder: Path) -> Iterator[Shard]:
    """The shards of a split: the same ones whenever its manifest is the same."""
    for speed in speeds:
        for number, cuts in enumerate(_portions(read_jsonl_gz(source))):
            yield Shard(number, speed, cuts, folder / f"speed-{speed:g}-{number:05d}")


def _portions(cuts: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    portion: list[dict[str, Any]] = []
    seconds = 0.0
    for cut in cuts:
        portion.append(cut)
        seconds += cut["duration"]
        if seconds >= SHARD_SECONDS:
            yield portion
            portion, seconds = [], 0.0
    if portion:
        yield portion


def _perturbed(cut: Cut, speed: float) -> Cut:
    """A copy of the cut at another speed; `source_id` keeps the name that it came from."""
    copy = fastcopy(cut) if speed == 1 else cut.perturb_speed(speed)
    copy.custom = (cut.custom or {}) | {"source_id": cut.id}
    return copy


def compute_shard(
    cuts: list[Cut], speed: float, stem: Path, settings: config.Features
) -> list[str]:
    """Writes the features of some cuts to `stem`.npy and, last, their manifest `stem`.jsonl.gz.

    With settings.store "on_the_fly" the manifest alone, and no audio is read.

    Args:
        cuts: cuts of one recording each.
        speed: factor of speed perturbation, 1 for none.
        stem: path without suffix.
        settings: how features are computed, and whether they are stored.

    Returns:
        A message for each recording that could not be read; the others are written.
    """
    copies = [_perturbed(cut, speed) for cut in cuts]
    manifest = stem.with_name(stem.name + ".jsonl.gz")
    if settings.store == "on_the_fly":
        for copy in copies:
            frames = compute_num_frames(copy.duration, FRAME_SHIFT, SAMPLING_RATE)
            copy.features = _described(copy, frames, ON_THE_FLY)
        write_manifest(copies, manifest)
        return []
    kept, waves, problems = [], [], []
    for copy in copies:
        try:
            waves.append(read_audio(copy))
            kept.append(copy)
        except ValueError as error:
            problems.append(f"{error}: left out")
    arrays = make_extractor(settings.extractor)(waves)
    array = stem.with_name(stem.name + ".npy")
    for copy, features, rows in zip(kept, arrays, write_shard(array, arrays), strict=True):
        copy.features = _described(copy, len(features), ShardReader.name, str(array), rows)
    write_manifest(kept, manifest)
    return problems


def _described(cut: Cut, num_frames: int, storage: str, path: str = "", key: str = "") -> Features:
    """What a manifest says of a cut's features."""
    return Features(
        type=StreamingFbank.name,
        num_frames=num_frames,
        num_features=NUM_BINS,
        frame_shift=FRAME_SHIFT,
        sampling_rate=SAMPLING_RATE,
        start=cut.start,
        duration=cut.duration,
        storage_type=storage,
        storage_path=path,
        storage_key=key,
        recording_id=cut.recording.id,
        channels=cut.channel,
    )


def _start_worker() -> None:
    work_for_parent()
    torch.set_num_threads(1)


def compute_split(experiment: Experiment, corpus: str, split: str, share: Share = ALL) -> None:
    """Computes one split of one corpus, or a share of it, unless that is done.

    The manifest is read shard by shard, so that memory does not grow with the corpus.

    Raises:
        ValueError: there is no manifest, or none of its recordings can be read.
    """
    source = experiment.manifests_dir / f"{corpus}_{split}.jsonl.gz"
    target = experiment.manifests_dir / f"{corpus}_{split}_fbank.jsonl.gz"
    folder = experiment.data_dir / "fbank" / f"{corpus}_{split}"
    _forget_features_of_another(source, target, folder)
    settings = experiment.config.data.features
    in_shar = split == "train" and experiment.config.train.shar  # its features may be nowhere else
    if settings.store == "precomputed" and not in_shar:
        _forget_damaged_shards(target, folder, share)
    if target.is_file():
        log.info("skip: %s is complete", target)
        return
    speeds = settings.speeds if split == "train" else (1.0,)
    cuts, seconds = 0, 0.0
    for cut in read_jsonl_gz(source):
        cuts += 1
        seconds += cut["duration"]
    with progress_bar(minutes_of()) as progress:
        name = f"{corpus} {split}: features"
        bar = progress.add_task(name, total=len(speeds) * seconds / 60 / share.of)
        manifests, problems = _compute_shards(
            (shard for shard in _shards(source, speeds, folder) if share.has(shard.number)),
            settings, lambda minutes: progress.advance(bar, minutes),
        )  # fmt: skip
    for problem in sorted(problems):
        log.warning("%s", problem)
    if not share.is_all:
        log.info(
            "%s %s: %d shards, share %d of %d",
            corpus,
            split,
            len(manifests),
            share.number,
            share.of,
        )
        return
    if cuts and not any(next(read_jsonl_gz(manifest), None) for manifest in manifests):
        raise ValueError(f"{corpus} {split}: none of its {cuts} recordings can be read")
    kept = join_jsonl_gz(target, manifests)
    log.info("%s %s: %d of %d cuts -> %s", corpus, split, kept, cuts * len(speeds), target)


def _forget_features_of_another(source: Path, target: Path, folder: Path) -> None:
    """Removes features that were computed from another manifest than the one that is there now."""
    if not source.is_file():
        raise ValueError(f"{source} does not exist: run the recipe's earlier stages, which make it")
    record = folder / "source.sha256"
    now = [sha256(source), str(FORMAT)]
    with locked(source.parent, "features", waits=True):  # of processes that share, one forgets
        if record.is_file():
            before = [*record.read_text(encoding="utf-8").split(), "1"][:2]  # at first without it
            if before != now:
                why = f"{source} has changed"
                if before[0] == now[0]:
                    why = f"what {source.name} has is of another version"
                log.info("%s: its features are computed again", why)
                target.unlink(missing_ok=True)
                shutil.rmtree(folder)
        atomic.write_text(record, " ".join(now))


def _forget_damaged_shards(target: Path, folder: Path, share: Share) -> None:
    """Removes the manifests of those shards of a share that have gone or are cut short."""
    for manifest in sorted(folder.glob("speed-*.jsonl.gz")):  # none that is being written
        stem = manifest.name.removesuffix(".jsonl.gz")
        shard = folder / f"{stem}.npy"
        if share.has(int(stem.rpartition("-")[2])) and not is_whole(shard):
            log.warning("%s is gone or cut short: it is computed again", shard)
            target.unlink(missing_ok=True)
            manifest.unlink()


def _compute_shards(
    shards: Iterable[Shard], settings: config.Features, done: Callable[[float], None]
) -> tuple[list[Path], list[str]]:
    """Computes the shards that are missing, in several processes, a few shards ahead.

    Args:
        shards: in the order of the manifest.
        settings: what to compute, and in how many processes.
        done: is told the minutes of audio of each finished shard.

    Returns:
        The manifest of each shard, and a message for each recording that could not be read.
    """
    manifests: list[Path] = []
    problems: list[str] = []
    running: dict[Future[list[str]], float] = {}
    # A process that was forked cannot use a GPU.
    start = multiprocessing.get_context("spawn" if settings.extractor == "kaldifeat" else None)
    with ProcessPoolExecutor(settings.jobs, start, _start_worker) as pool:
        for shard in shards:
            manifests.append(shard.manifest)
            if shard.manifest.is_file():
                done(shard.minutes)
                continue
            running[pool.submit(compute_missing, shard, settings)] = shard.minutes
            if len(running) > SHARDS_AHEAD * settings.jobs:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    problems += future.result()
                    done(running.pop(future))
        for future in as_completed(running):
            problems += future.result()
            done(running[future])
    return manifests, problems


def compute_missing(shard: Shard, settings: config.Features) -> list[str]:
    """`compute_shard`, unless another process has done it; waits for one that is at it."""
    with claimed(shard.manifest):
        if shard.manifest.is_file():
            return []
        cuts = list(CutSet.from_dicts(shard.cuts))
        return compute_shard(cuts, shard.speed, shard.stem, settings)


def compute_features(experiment: Experiment, share: Share = ALL) -> None:
    """Computes what is missing of every corpus and split, or a share of it."""
    for corpus in experiment.config.data.corpora:
        for split in SPLITS:
            compute_split(experiment, corpus, split, share)
    if share.is_all:
        write_provenance(experiment, "features", fbank=asdict(StreamingFbankConfig()))


if __name__ == "__main__":
    run_stage_in_shares(__doc__, compute_features)
