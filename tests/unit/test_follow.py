"""A change of a corpus arrives in every later stage, and nothing is swapped under a training."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from icetransfer import decode, train, transfer
from icetransfer.average import average_run
from icetransfer.config import load_config
from icetransfer.data import corpora, features, subset, tokenizer
from icetransfer.data.jsonl import read_jsonl_gz
from icetransfer.data.tokenizer import Tokenizer
from icetransfer.experiment import Experiment, create_experiment
from icetransfer.training import resume
from tests.unit.conftest import SHORT, WORDS, speak

DATA_STAGES = (
    *(corpora.prepare, features.compute_features, subset.make_subset, tokenizer.make_tokenizer),
)


class Folder:
    """A folder of recordings and its transcripts."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, {}
        self.draw = np.random.default_rng(5)
        (path / "audio").mkdir(parents=True)

    def add(self, name: str, text: str) -> None:
        samples = speak([word if word in WORDS else "een" for word in text.split()], self.draw)
        soundfile.write(self.path / "audio" / f"{name}.flac", samples, 16000)
        self.rows[name] = text
        self.save()

    def save(self) -> None:
        lines = [f"audio/{name}.flac\t{text}\ta\n" for name, text in self.rows.items()]
        (self.path / "transcripts.tsv").write_text("".join(lines), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder(tmp_path / "corpus")
    for number in range(40):
        words = made.draw.choice(WORDS, size=4)
        made.add(f"r{number:02d}", " ".join(map(str, words)))
    return made


@pytest.fixture
def experiment(tmp_path: Path, folder: Folder, base_path: Path) -> Experiment:
    corpus = f"{{kind: folder, path: {folder.path}, holdout_every: 8}}"
    settings = [
        "language=nl", f"data.dir={tmp_path / 'data'}", f"data.corpora={{c: {corpus}}}",
        "data.vocab_size=30", "data.features={jobs: 1, speeds: [1.0]}",
        f"transfer.base_models={{en: {base_path}, ml: {base_path}}}", *SHORT,
        "decode.engines=[torch]", "decode.precisions=[fp32]", "decode.chunk_sizes=[16]",
    ]  # fmt: skip
    return create_experiment(tmp_path / "exp", load_config([], settings))


def run_data_stages(experiment: Experiment) -> None:
    for stage in DATA_STAGES:
        stage(experiment)


def ids(experiment: Experiment, split: str) -> set[str]:
    manifest = experiment.manifests_dir / f"c_{split}_fbank.jsonl.gz"
    return {cut["custom"]["source_id"] for cut in read_jsonl_gz(manifest)}


def test_what_is_added_arrives_everywhere(folder: Folder, experiment: Experiment, caplog) -> None:
    run_data_stages(experiment)
    transfer.make_start(experiment)
    before = {split: ids(experiment, split) for split in ("train", "dev", "test")}
    with caplog.at_level("INFO", logger="icetransfer"):
        run_data_stages(experiment)
        transfer.make_start(experiment)
    assert caplog.text.count("skip: ") == 7, "nothing changed: every output is right as it is"
    folder.add("zebra", "zeven zebras zwemmen")
    run_data_stages(experiment)
    after = {split: ids(experiment, split) for split in before}
    (new,) = set.union(*after.values()) - set.union(*before.values())
    assert "zebra" in new
    if new in after["train"]:
        assert ("c", new) in subset.read_subset(subset.subset_path(experiment))
        recipe = Tokenizer(experiment.recipe_lang_dir / "bpe.model")
        assert recipe.unknown_characters("zebra") == ""
    with caplog.at_level("INFO", logger="icetransfer"):
        transfer.make_start(experiment)
    own = Tokenizer(experiment.lang_dir / "bpe.model")
    assert own.tokens == Tokenizer(experiment.recipe_lang_dir / "bpe.model").tokens
    train.train(experiment)
    assert resume.saved_steps(experiment)[-1] == 8


def test_what_is_deleted_is_gone(folder: Folder, experiment: Experiment) -> None:
    run_data_stages(experiment)
    victim = next(iter(sorted(ids(experiment, "train"))))
    name = next(name for name in folder.rows if name in victim)
    del folder.rows[name]
    folder.save()
    run_data_stages(experiment)
    assert victim not in ids(experiment, "train")
    assert ("c", victim) not in subset.read_subset(subset.subset_path(experiment))


def test_nothing_is_swapped_under_a_training(folder: Folder, experiment: Experiment) -> None:
    run_data_stages(experiment)
    transfer.make_start(experiment)
    train.train(experiment)
    average_run(experiment)
    decode.decode_all(experiment)
    tokens = (experiment.lang_dir / "bpe.model").read_bytes()
    for name, text in folder.rows.items():
        folder.rows[name] = text.replace("een", "eentje")
    folder.save()
    run_data_stages(experiment)
    assert (experiment.recipe_lang_dir / "bpe.model").read_bytes() != tokens
    assert (experiment.lang_dir / "bpe.model").read_bytes() == tokens, "its own"
    with pytest.raises(
        ValueError, match=r"training has begun from other things .*changed: bpe\.model"
    ):
        transfer.make_start(experiment)
    with pytest.raises(ValueError, match="was trained on other data than there are now"):
        train.train(experiment)


def test_a_changed_test_set_is_decoded_again(
    folder: Folder, experiment: Experiment, caplog
) -> None:
    run_data_stages(experiment)
    transfer.make_start(experiment)
    train.train(experiment)
    average_run(experiment)
    decode.decode_all(experiment)
    (path,) = experiment.decode_dir.rglob("wer.json")
    before = path.read_text()
    victim = next(iter(ids(experiment, "test")))
    name = next(name for name in folder.rows if name in victim)
    folder.rows[name] = "zes zes zes zes zes zes zes"
    folder.save()
    corpora.prepare(experiment)
    features.compute_features(experiment)
    with caplog.at_level("INFO", logger="icetransfer"):
        decode.decode_all(experiment)
    assert "is of another test_set_sha256: decoding again" in caplog.text
    assert path.read_text() != before
