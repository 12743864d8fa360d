from pathlib import Path

import pytest
import yaml

from icetransfer import config

MINIMAL = {"language": "nl", "data": {"corpora": {"slots": {"kind": "synthetic"}}}}


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "minimal.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def test_defaults_files_and_command_line_in_that_order(minimal, tmp_path):
    over = tmp_path / "over.yaml"
    over.write_text("train: {max_steps: 7, lr: 0.01}\n")
    tree = config.load_config([minimal, over], ["train.lr=0.02"])
    assert (tree.train.max_steps, tree.train.lr, tree.train.threads) == (7, 0.02, 1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.mx_steps=5", "did you mean train.max_steps?"),
        ("max_steps=5", "did you mean train.max_steps?"),
        ("vocab_size=100", "did you mean data.vocab_size?"),
        ("data.corpora.slots.domin=open", "did you mean data.corpora.NAME.domain?"),
        ("data.corpora.slots.domain=x", "data.corpora.slots.domain: expected 'slots'"),
        ("train.chunk_sizes=[8, 28]", "train.chunk_sizes has [28]: a chunk is a multiple of 8"),
        ("decode.chunk_sizes=[0]", "decode.chunk_sizes has [0]"),
        (
            "data.features={store: on_the_fly, extractor: kaldifeat}",
            "config key data.features: extractor=kaldifeat needs store=precomputed",
        ),
        ("hours=-3", "hours: expected more than 0"),
        ("train.max_steps", "expected key=value"),
        ("train.max_steps=[", "is not YAML"),
    ],
)
def test_a_bad_setting_is_named_with_its_cure(minimal, override, message):
    with pytest.raises(ValueError) as error:
        config.load_config([minimal], [override])
    assert message in str(error.value)


def test_a_missing_file_and_a_missing_key_are_named(minimal, tmp_path):
    with pytest.raises(ValueError, match=r"absent\.yaml does not exist"):
        config.load_config([tmp_path / "absent.yaml"])
    with pytest.raises(ValueError, match="config key language is required"):
        config.load_config([], ["data.corpora.a.kind=synthetic"])


@pytest.mark.parametrize(
    ("text", "hours", "label"),
    [
        ("2min", 2 / 60, "2min"),
        ("100h", 100, "100h"),
        ("0.5", 0.5, "30min"),
        ("2500", 2500, "2500h"),
    ],
)
def test_hours_are_read_as_people_write_them(minimal, text, hours, label):
    tree = config.load_config([minimal], [f"hours={text}"])
    assert tree.hours == pytest.approx(hours)
    assert config.hours_label(tree.hours) == label


def test_the_saved_tree_reads_back_as_itself(minimal, tmp_path):
    tree = config.load_config([minimal], ["hours=8min", "init=en", "seed=3"])
    saved = tmp_path / "saved.yaml"
    saved.write_text(config.dump_config(tree))
    assert config.load_config([saved]) == tree
    assert tree.name == "en-8min-seed3"


def test_tiers_are_named_with_their_look_ahead():
    assert config.chunk_label(16) == "320 ms (+130 ms look-ahead)"
    assert config.chunk_label(-1) == "offline"
    assert [config.chunk_ms(size) for size in (8, 32, -1)] == [160, 640, -1]


def test_null_takes_out_what_an_earlier_file_set(minimal, tmp_path):
    over = tmp_path / "over.yaml"
    over.write_text("data: {corpora: {slots: null, own: {kind: folder, path: d}}}\n")
    assert list(config.load_config([minimal, over]).data.corpora) == ["own"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("train: {max_steps: 7", "is not YAML"),
        ("- train\n- data", "must hold keys and values, not list"),
    ],
)
def test_a_config_file_that_is_none_is_named(
    tmp_path: Path, text: str | None, message: str
) -> None:
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=f"mine.yaml {message}"):
        config.load_config([path])


def test_names_of_base_models_of_earlier_versions_are_todays(minimal: Path) -> None:
    old = config.load_config([minimal], ["transfer.base_models={en: seed-en, ml: seed-ml}"])
    assert old == config.load_config([minimal])
    own = config.load_config([minimal], ["transfer.base_models.en=epoch-30.pt"])
    assert own.transfer.base_models["en"] == "epoch-30.pt"
