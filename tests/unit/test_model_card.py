"""The seeds' card, from two runs that only pretend to have been trained."""

import json
from pathlib import Path
from typing import Any

import pytest

from icetransfer.config import BASE_RECIPES, load_config
from icetransfer.experiment import create_experiment
from icetransfer.model.checkpoint import load_transducer, save_checkpoint
from icetransfer.model.transducer import TransducerDims, build_transducer
from icetransfer.model_card import RUN, publish
from icetransfer.score import planned_runs
from icetransfer.stage.stamp import sha256

WORDS = 200
CHARACTERS = 1000


def make_run(root: Path, name: str, languages: list[str], dims: TransducerDims) -> Path:
    """A run with a random model; a test set's WER is its chunk size in percent, dev is half."""
    corpora = {
        f"open-{language}": {"kind": "synthetic", "language": language, "minutes": {"train": 90}}
        for language in languages
    }
    settings = [
        f"language={name}",
        "init=random",
        f"data.dir={root / 'data' / name}",
        f"data.corpora={json.dumps(corpora)}",
        "train.max_steps=20000",
        "train.batch_seconds=20",
        "decode.splits=[dev, test]",
        "decode.engines=[torch]",
        "decode.chunk_sizes=[8, 16]",
        "decode.precisions=[fp32]",
    ]
    run = create_experiment(root / "egs" / BASE_RECIPES[name] / RUN, load_config([], settings))
    save_checkpoint(run.averaged_checkpoint, build_transducer(dims, seed=len(languages)))
    stages = {"transfer": {"git_commit": "abc"}, "train": {"seconds": 600.0}}
    (run.dir / "provenance.json").write_text(json.dumps(stages))
    run.manifests_dir.mkdir(parents=True)
    subset = {"corpora": {corpus: {"hours": 1.5} for corpus in corpora}}
    (run.manifests_dir / "subset-all.json").write_text(json.dumps(subset))
    for planned in planned_runs(run.config):
        percent = planned.chunk_size / (2 if planned.test_set.endswith("-dev") else 1)
        result: dict[str, Any] = {
            "test_set": planned.test_set,
            "chunk_size": planned.chunk_size,
            "errors": WORDS * percent / 100,
            "words": WORDS,
            "character_errors": CHARACTERS / 100,
            "characters": CHARACTERS,
            "checkpoint_sha256": sha256(run.averaged_checkpoint),
        }
        folder = planned.folder(run.decode_dir)
        folder.mkdir(parents=True)
        (folder / "wer.json").write_text(json.dumps(result))
    return run.dir


@pytest.fixture
def root(tmp_path: Path, nano_dims: TransducerDims) -> Path:
    make_run(tmp_path, "en", ["en"], nano_dims)
    make_run(tmp_path, "ml", ["es", "de"], nano_dims)
    return tmp_path


def test_base_models_and_card(root: Path) -> None:
    publish(root)
    folder = root / "egs" / "base_models"
    card = (folder / "README.md").read_text()
    for name in ("en", "ml"):
        assert load_transducer(folder / f"{name}.pt").chunk_sizes
        assert sha256(folder / f"{name}.pt") in card
    assert "| languages | en | de es |" in card
    assert "| speech | 90 minutes, each at 3 speeds | 180 minutes, each at 3 speeds |" in card
    assert "| dev | 160 ms (+130 ms look-ahead) | 4.0 / 1.0 | 4.0 / 1.0 |" in card
    assert "| test | 320 ms (+130 ms look-ahead) | 16.0 / 1.0 | 16.0 / 1.0 |" in card


def test_an_unfinished_run_is_named(root: Path) -> None:
    run = root / "egs" / "multilingual" / RUN
    next(run.glob("decode/*/*/wer.json")).unlink()
    with pytest.raises(ValueError, match=r"egs/multilingual/run.sh --stop-stage 9"):
        publish(root)
    assert not (root / "egs" / "base_models").exists()


def test_results_of_another_model_are_refused(root: Path, nano_dims: TransducerDims) -> None:
    averaged = root / "egs" / "en" / RUN / "averaged.pt"
    save_checkpoint(averaged, build_transducer(nano_dims, seed=9))
    with pytest.raises(ValueError, match="run stage 9 again"):
        publish(root)
