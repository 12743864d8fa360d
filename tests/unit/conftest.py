"""A recipe of tones: data, transfer and training are tested in seconds."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from lhotse import MonoCut, Recording, SupervisionSegment

from icetransfer import transfer
from icetransfer.config import load_config
from icetransfer.data import features, subset, tokenizer
from icetransfer.data.tokenizer import Tokenizer
from icetransfer.experiment import Experiment, create_experiment
from icetransfer.export import Source, export_tier
from icetransfer.model.checkpoint import save_checkpoint
from icetransfer.model.transducer import TransducerDims, build_transducer
from icetransfer.streaming.exported import Exported, write_tokens

WORDS = ("een", "twee", "drie", "vier", "vijf", "zes")
CORPUS = "tones"
SIZES = {"train": 36, "dev": 6, "test": 4}

SHORT = (  # a run of seconds, with a checkpoint at steps 3, 5 (where the average begins), 6 and 8
    "train.max_steps=8",
    "train.batch_seconds=8",
    "train.checkpoint_every=3",
    "train.keep_checkpoints=2",
    "train.average_period=2",
    "train.average_fraction=0.3",
    "train.log_every=2",
    "train.valid_every=4",
    "train.loss_backend=torch",
)

MakeExperiment = Callable[..., Experiment]


def speak(words: list[str], rng: np.random.Generator) -> np.ndarray:
    """A chord of 0.3 s for each word, in noise; float32, 16 kHz."""
    time = np.arange(4800) / 16000
    tones = [np.sin(2 * np.pi * 300 * (WORDS.index(word) + 1) * time) for word in words]
    samples = 0.2 * np.concatenate(tones)
    return (samples + 0.01 * rng.standard_normal(len(samples))).astype(np.float32)


def make_cut(path: Path, text: str, samples: np.ndarray) -> MonoCut:
    """Writes the audio and describes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, 16000)
    recording = Recording.from_file(path, recording_id=path.stem)
    segment = SupervisionSegment(path.stem, path.stem, 0, recording.duration, text=text)
    return MonoCut(path.stem, 0, recording.duration, 0, recording=recording, supervisions=[segment])


def write_split(folder: Path, split: str, cuts: list[MonoCut]) -> None:
    """Writes the manifest that stage 1 would."""
    features.write_manifest(cuts, folder / "manifests" / f"{CORPUS}_{split}.jsonl.gz")


@pytest.fixture(scope="session")
def tone_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder as stage 1 leaves it: 36, 6 and 4 recordings of 2 to 6 words."""
    folder = tmp_path_factory.mktemp("tones")
    rng = np.random.default_rng(7)
    for split, count in SIZES.items():
        cuts = []
        for number in range(count):
            words = [str(word) for word in rng.choice(WORDS, size=rng.integers(2, 7))]
            path = folder / "audio" / f"{split}-{number:02d}.flac"
            cuts.append(make_cut(path, " ".join(words), speak(words, rng)))
        write_split(folder, split, cuts)
    return folder


@pytest.fixture(scope="session")
def tone_recipe(tone_data: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeExperiment:
    """Makes experiments on the tones, whose features and tokens are there.

    The fixture's value is called with the experiment's name and config overrides.
    """

    def make(name: str, *overrides: str) -> Experiment:
        folder = tmp_path_factory.mktemp(name)
        config = load_config([], [*base_overrides(tone_data), *overrides])
        experiment = create_experiment(folder, config)
        for stage in (features.compute_features, subset.make_subset, tokenizer.make_tokenizer):
            stage(experiment)
        return experiment

    return make


def base_overrides(data: Path) -> list[str]:
    """The config of a recipe of tones."""
    corpora: dict[str, Any] = {CORPUS: {"kind": "folder", "path": "unused"}}
    return [
        "language=nl",
        f"data.dir={data}",
        f"data.corpora={corpora}",
        "data.vocab_size=30",
        "data.features.jobs=1",
    ]


@pytest.fixture(scope="session")
def nano_dims() -> TransducerDims:
    """Two stacks of one layer: a step takes milliseconds."""
    return TransducerDims(
        num_encoder_layers=(1, 1),
        downsampling_factor=(1, 2),
        encoder_dim=(16, 24),
        feedforward_dim=(32, 48),
        num_heads=(2, 2),
        query_head_dim=(8, 8),
        value_head_dim=(4, 4),
        pos_head_dim=(4, 4),
        cnn_module_kernel=(7, 7),
        vocab_size=20,
        decoder_dim=16,
        joiner_dim=16,
        pos_dim=8,
        subsampling_channels=(2, 4, 8),
        use_ctc=True,
    )


@pytest.fixture(scope="session")
def base_path(tmp_path_factory: pytest.TempPathFactory, nano_dims: TransducerDims) -> Path:
    """A checkpoint to start from."""
    path = tmp_path_factory.mktemp("base") / "base.pt"
    save_checkpoint(path, build_transducer(nano_dims, seed=11))
    return path


@pytest.fixture(scope="session")
def nano_bundle(tmp_path_factory: pytest.TempPathFactory, nano_dims: TransducerDims) -> Exported:
    """An export at 320 ms of a model that says "een" in every frame."""
    folder = tmp_path_factory.mktemp("nano")
    tokens = ["<blk>", "<sos/eos>", "<unk>", "▁", "▁een", *(f"t{i}" for i in range(5, 20))]
    write_tokens(tokens, folder / "given.txt")
    model = build_transducer(nano_dims, seed=1).eval()
    model.joiner.output_linear.bias.data[4] = 9.0
    source = Source(folder / "nano.pt", model, folder / "given.txt", "0" * 64)
    export_tier(source, Exported(folder / "chunk-16-left-16"), 16, 16, ["int8"])
    return Exported(folder / "chunk-16-left-16")


@pytest.fixture(scope="session")
def prepare(tone_recipe: MakeExperiment, base_path: Path) -> MakeExperiment:
    """Makes experiments of the tones that are ready to train, with the settings of SHORT."""

    def make(name: str, *overrides: str) -> Experiment:
        base = f"transfer.base_models={{en: {base_path}, ml: {base_path}}}"
        experiment = tone_recipe(name, base, *SHORT, *overrides)
        transfer.make_start(experiment)
        return experiment

    return make


@pytest.fixture(scope="session")
def save_random_model(nano_dims: TransducerDims) -> Callable[[Experiment], None]:
    """Gives an experiment averaged weights: of a random model that says something."""

    def save(experiment: Experiment) -> None:
        vocab_size = Tokenizer(experiment.lang_dir / "bpe.model").vocab_size
        model = build_transducer(nano_dims.with_vocabulary(vocab_size), seed=5)
        with torch.no_grad():
            model.joiner.output_linear.weight *= 8
            model.joiner.output_linear.bias[0] = 0.5
        save_checkpoint(experiment.averaged_checkpoint, model)

    return save


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder], capture_output=True
    )
    if made.returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)
