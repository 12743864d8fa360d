import hashlib
import json

import pytest

from icetransfer import config, experiment
from icetransfer.stage import atomic
from icetransfer.stage.stamp import sha256

CORPUS = "data.corpora.slots.kind=synthetic"


def resolved(tmp_path, *overrides):
    return config.load_config([], ["language=nl", CORPUS, f"data.dir={tmp_path}/data", *overrides])


def test_an_experiment_is_made_once_and_opened_again(tmp_path):
    made = experiment.create_experiment(tmp_path / "exp", resolved(tmp_path))
    again = experiment.create_experiment(tmp_path / "exp", resolved(tmp_path))
    assert experiment.open_experiment(tmp_path / "exp") == made == again


def test_a_changed_config_is_refused_with_the_difference(tmp_path):
    experiment.create_experiment(tmp_path / "exp", resolved(tmp_path))
    with pytest.raises(ValueError, match=r"train\.max_steps: None -> 5") as error:
        experiment.create_experiment(tmp_path / "exp", resolved(tmp_path, "train.max_steps=5"))
    assert "another --exp" in str(error.value)


def test_changed_data_are_refused_for_every_experiment_of_the_recipe(tmp_path):
    experiment.create_experiment(tmp_path / "a", resolved(tmp_path))
    with pytest.raises(ValueError, match=r"vocab_size: 500 -> 60[\s\S]*another data\.dir"):
        experiment.create_experiment(tmp_path / "b", resolved(tmp_path, "data.vocab_size=60"))


def test_opening_a_folder_without_config_says_what_makes_it(tmp_path):
    with pytest.raises(ValueError, match=r"run\.sh, which makes it"):
        experiment.open_experiment(tmp_path)


def test_tiers_have_folders_of_their_own(tmp_path):
    made = experiment.create_experiment(tmp_path / "exp", resolved(tmp_path))
    assert made.onnx_dir(16).name == "chunk-16-left-128"
    assert made.onnx_dir(-1).name == "offline"


def test_provenance_of_two_stages_stands_side_by_side(tmp_path):
    made = experiment.create_experiment(tmp_path / "exp", resolved(tmp_path, "seed=4"))
    experiment.write_provenance(made, "transfer", base="seed-ml")
    experiment.write_provenance(made, "train")
    written = json.loads((made.dir / "provenance.json").read_text())
    assert written["transfer"]["base"] == "seed-ml"
    assert written["train"]["seed"] == 4
    assert written["train"]["versions"]["torch"]


def test_sha256_of_a_file(tmp_path):
    (tmp_path / "f").write_bytes(b"x" * 3_000_000)
    assert sha256(tmp_path / "f") == hashlib.sha256(b"x" * 3_000_000).hexdigest()


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    target = tmp_path / "result.json"
    atomic.write_text(target, "old")
    with pytest.raises(RuntimeError), atomic.atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError("killed")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_users_mistake_ends_with_code_2_and_one_message(capsys):
    def fail():
        raise ValueError("corpus X is missing: fetch it")

    with pytest.raises(SystemExit) as ended:
        experiment.main(fail)
    assert ended.value.code == experiment.USER_ERROR
    assert "error: corpus X is missing: fetch it" in capsys.readouterr().err
