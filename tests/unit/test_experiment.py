import hashlib
import json
from pathlib import Path

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


def changed(tmp_path, *overrides, change=False, at_step=0):
    """What happens to an experiment, at a step of its training, that is asked for with others."""
    made = experiment.create_experiment(tmp_path / "exp", resolved(tmp_path))
    if at_step:
        made.checkpoints_dir.mkdir(exist_ok=True)
        (made.checkpoints_dir / f"checkpoint-{at_step}.pt").touch()
    wanted = resolved(tmp_path, *overrides)
    return experiment.create_experiment(tmp_path / "exp", wanted, {}, change)


def test_what_an_experiment_means_is_not_changed(tmp_path):
    for override, difference in (
        ("seed=2", "seed: 1 -> 2"),
        ("transfer.ctc=false", "transfer.ctc: True -> False"),
        ("train.chunk_sizes=[16]", r"train.chunk_sizes: \[8, 16, 32, -1\] -> \[16\]"),
    ):
        with pytest.raises(ValueError, match=difference) as error:
            changed(tmp_path, override, change=True)
        assert f"add --exp {tmp_path / 'exp'}-2" in str(error.value)


@pytest.mark.parametrize(
    "override",
    [
        *("train.workers=4", "train.log_every=7", "train.keep_checkpoints=1", "train.threads=2"),
        *("decode.batch_streams=3", "data.features.jobs=1", "decode.chunk_sizes=[16, 64]"),
        *("decode.search=modified_beam_search", "export.int8.decoder=true", "remedy.int8=1"),
    ],
)
def test_what_does_not_touch_the_training_is_free_and_recorded(tmp_path, override, caplog):
    with caplog.at_level("WARNING", logger="icetransfer"):
        made = changed(tmp_path, override, at_step=40)
    key = override.partition("=")[0]
    assert experiment.open_experiment(made.dir).config == made.config
    (record,) = json.loads((made.dir / "provenance.json").read_text())["changes"]
    assert record["step"] == 40 and record["keys"][0].startswith(f"{key}: ")
    assert f"{key}: " in caplog.text
    again = experiment.create_experiment(made.dir, resolved(tmp_path, override), {})
    assert again == made, "nothing changes the second time"
    assert len(json.loads((made.dir / "provenance.json").read_text())["changes"]) == 1


def test_the_course_of_a_training_changes_when_asked_for(tmp_path):
    override = "train.batch_seconds=30"
    assert changed(tmp_path, override).config.train.batch_seconds == 30, "nothing has begun"
    with pytest.raises(ValueError, match=r"is at step 200, .*[\s\S]*add --change to go on"):
        changed(tmp_path, "train.max_steps=900", at_step=200)
    (tmp_path / "exp" / "scheme.json").write_text("{}")
    made = changed(tmp_path, "train.max_steps=900", at_step=200, change=True)
    assert made.config.train.max_steps == 900
    assert not made.scheme_path.exists(), "what follows from the length is decided again"
    records = json.loads((made.dir / "provenance.json").read_text())["changes"]
    assert [r["step"] for r in records][-1] == 200


def test_changed_data_are_refused_for_every_experiment_of_the_recipe(tmp_path):
    experiment.create_experiment(tmp_path / "a", resolved(tmp_path))
    with pytest.raises(ValueError, match=r"vocab_size: 500 -> 60[\s\S]*another data\.dir"):
        experiment.create_experiment(tmp_path / "b", resolved(tmp_path, "data.vocab_size=60"))


def test_opening_a_folder_without_config_says_what_makes_it(tmp_path):
    with pytest.raises(ValueError, match=r"run\.sh, which makes it"):
        experiment.open_experiment(tmp_path)


def test_a_damaged_record_of_an_early_stop_is_named(tmp_path):
    made = experiment.create_experiment(tmp_path / "exp", resolved(tmp_path))
    made.checkpoints_dir.mkdir(exist_ok=True)
    made.stopped_early_path.write_text("1200\n")
    assert made.final_step == 1200
    for content, said in (
        (b"", "holds '', expected the last step"),
        (b"12 00\n", r"holds '12 00\\n', expected .* remove it and run stage 6 again"),
        (b"\xff\x00", "is not UTF-8"),
    ):
        made.stopped_early_path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"exp/checkpoints/stopped-early {said}"):
            _ = made.final_step


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


def test_a_command_works_from_anywhere_and_shows_paths_from_there(
    tmp_path, monkeypatch, capsys
) -> None:
    recipe = tmp_path / "egs" / "nl"
    (recipe / "exp" / "a").mkdir(parents=True)
    (recipe / "run.sh").touch()
    monkeypatch.delenv(experiment.CALLED_FROM, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(experiment.CALLED_FROM, str(tmp_path))
    assert experiment.enter_recipe(Path("egs/nl/exp/a")) == Path("exp/a")
    assert Path.cwd() == recipe
    seen = experiment.as_seen("exp/a/init.pt of data/lang, not docs/data/x or /exp/y")
    assert seen == "egs/nl/exp/a/init.pt of egs/nl/data/lang, not docs/data/x or /exp/y"
    assert experiment.enter_recipe(Path("exp/a")) == Path("exp/a"), "already there"
    monkeypatch.chdir(tmp_path)
    elsewhere = tmp_path / "other"
    assert experiment.enter_recipe(elsewhere) == elsewhere and Path.cwd() == tmp_path


def test_an_error_shows_paths_from_where_the_user_stands(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "egs/nl").mkdir(parents=True)
    monkeypatch.setenv(experiment.CALLED_FROM, str(tmp_path))
    monkeypatch.chdir(tmp_path / "egs/nl")

    def fail() -> None:
        raise ValueError("data/manifests/x.jsonl.gz is damaged")

    with pytest.raises(SystemExit):
        experiment.main(fail)
    assert capsys.readouterr().err == "error: egs/nl/data/manifests/x.jsonl.gz is damaged\n"
