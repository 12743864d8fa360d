import dataclasses
import json
import re
import shutil

import pytest
import torch
import yaml

from icetransfer import transfer
from icetransfer.export import Source
from icetransfer.model.checkpoint import read_checkpoint, save_checkpoint
from icetransfer.model.transducer import SIZES, build_transducer
from icetransfer.stage.stamp import sha256
from tests import hub


@pytest.fixture(scope="module")
def base_path(tmp_path_factory, nano_dims):
    path = tmp_path_factory.mktemp("base") / "base.pt"
    save_checkpoint(path, build_transducer(nano_dims, seed=11))
    return path


def both(path):
    return f"transfer.base_models={{en: {path}, ml: {path}}}"


def start(tone_recipe, name, *overrides):
    """Runs the stage; returns the experiment, the new model's weights and the report."""
    experiment = tone_recipe(name, *overrides)
    transfer.make_start(experiment)
    dims, weights, _ = read_checkpoint(experiment.init_checkpoint)
    return dims, weights, json.loads((experiment.dir / "transfer.json").read_text())


def part(name):
    return name.split(".")[0]


def test_the_encoder_is_loaded_and_the_rest_is_new(tone_recipe, base_path, nano_dims):
    dims, weights, report = start(tone_recipe, "ml", "init=ml", both(base_path))
    _, base, _ = read_checkpoint(base_path)
    assert dims.vocab_size == 30 != nano_dims.vocab_size
    assert dims.encoder_dim == nano_dims.encoder_dim
    assert report["parameters"].keys() == weights.keys()
    for name, entry in report["parameters"].items():
        loaded = part(name) in ("encoder_embed", "encoder")
        assert entry["fate"] == ("loaded" if loaded else "reinitialised")
        assert entry["count"] == weights[name].numel() and entry["shape"] == [*weights[name].shape]
        if loaded:
            assert torch.equal(weights[name], base[name])
        elif weights[name].dim() > 1 and weights[name].shape == base[name].shape:
            assert not torch.equal(weights[name], base[name])
    for group, fates in report["groups"].items():
        for fate in ("loaded", "reinitialised"):
            counts = [
                weights[name].numel()
                for name, entry in report["parameters"].items()
                if part(name) == group and entry["fate"] == fate
            ]
            expected = {"tensors": len(counts), "parameters": sum(counts)} if counts else None
            assert fates.get(fate) == expected
    assert {part(name) for name in report["left_out"]} == {
        "decoder", "joiner", "simple_am_proj", "simple_lm_proj", "ctc_output"
    }  # fmt: skip
    assert report["base_model"]["sha256"] == sha256(base_path)
    assert report["base_model"]["path"] == str(base_path)


def test_a_part_not_asked_for_is_new_and_said_to_be(tone_recipe, base_path):
    _, weights, report = start(
        tone_recipe, "half", "init=en", both(base_path), "transfer.parts=[encoder]"
    )
    _, base, _ = read_checkpoint(base_path)
    assert set(report["groups"]["encoder_embed"]) == {"reinitialised", "left_out"}
    assert set(report["groups"]["encoder"]) == {"loaded"}
    name = "encoder_embed.out.weight"
    assert not torch.equal(weights[name], base[name])
    assert report["parts"] == ["encoder"]


def test_a_range_of_stacks_is_loaded_and_the_others_are_new(tone_recipe, base_path):
    _, weights, report = start(
        tone_recipe, "range", "init=ml", both(base_path), "transfer.parts=[encoder.encoders.0-0]"
    )
    _, base, _ = read_checkpoint(base_path)
    for name, entry in report["parameters"].items():
        first = name.startswith("encoder.encoders.0.")
        assert entry["fate"] == ("loaded" if first else "reinitialised")
        assert entry["origin"] == ("base" if first else "initialised with seed 1")
        if first:
            assert torch.equal(weights[name], base[name])
    name = "encoder.encoders.1.encoder.layers.0.self_attn1.in_proj.weight"
    assert not torch.equal(weights[name], base[name])
    with pytest.raises(ValueError, match=r"encoder\.encoders\.2-3 matches no parameter"):
        start(tone_recipe, "none", both(base_path), "transfer.parts=[encoder.encoders.2-3]")


def test_random_takes_the_dimensions_of_the_english_model_and_no_weights(tone_recipe, base_path):
    _, weights, report = start(tone_recipe, "random", "init=random", both(base_path))
    _, base, _ = read_checkpoint(base_path)
    assert {entry["fate"] for entry in report["parameters"].values()} == {"reinitialised"}
    assert report["left_out"] == {} and report["parts"] == []
    assert "dimensions only" in report["base_model"]["used_for"]
    name = "encoder_embed.out.weight"
    assert weights[name].shape == base[name].shape and not torch.equal(weights[name], base[name])


def test_the_seed_decides_what_is_new_and_the_init_does_not(tone_recipe, base_path):
    one = start(tone_recipe, "s1", "init=ml", "seed=1", both(base_path))[1]
    same = start(tone_recipe, "s1en", "init=en", "seed=1", both(base_path))[1]
    two = start(tone_recipe, "s2", "init=ml", "seed=2", both(base_path))[1]
    name = "joiner.output_linear.weight"
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], two[name])


def test_a_named_size_needs_no_base_model(tone_recipe):
    dims, _, report = start(tone_recipe, "sized", "init=random", "transfer.size=tiny")
    assert report["base_model"] is None
    assert dims.encoder_dim == SIZES["tiny"].encoder_dim
    with pytest.raises(ValueError, match=r"transfer\.size=huge is not one of .*tiny"):
        start(tone_recipe, "huge", "init=random", "transfer.size=huge")


def test_the_ctc_head_and_the_tiers_come_from_the_config(tone_recipe, base_path):
    dims, weights, _ = start(
        tone_recipe, "noctc", "init=ml", both(base_path), "transfer.ctc=false",
        "train.chunk_sizes=[16,-1]", "train.left_context_frames=[32]",
    )  # fmt: skip
    assert not any(part(name) == "ctc_output" for name in weights)
    assert dims.chunk_sizes == (16, -1) and dims.left_context_frames == (32,)


def test_a_base_that_does_not_fit_is_an_error(nano_dims):
    model = build_transducer(nano_dims, seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    base = build_transducer(nano_dims, seed=2).state_dict()
    parts = ("encoder_embed", "encoder")
    missing = {name: value for name, value in base.items() if name != "encoder_embed.out.weight"}
    with pytest.raises(ValueError, match=r"encoder_embed\.out\.weight is missing"):
        transfer.transfer(model, missing, parts)
    with pytest.raises(ValueError, match=r"encoder\.more has no place"):
        transfer.transfer(model, {**base, "encoder.more": torch.zeros(1)}, parts)
    wider = dataclasses.replace(nano_dims, feedforward_dim=(40, 64))
    with pytest.raises(ValueError, match=r"expected \("):
        transfer.transfer(model, build_transducer(wider).state_dict(), parts)
    other = {f"model.{name}": value for name, value in base.items()}
    with pytest.raises(ValueError, match="is missing"):
        transfer.transfer(model, other, parts)
    with pytest.raises(ValueError, match="nothing to load"):
        transfer.transfer(model, base, ())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.fixture
def model_hub(monkeypatch, tmp_path):
    """A stand-in for the model hub."""
    with hub.serving(monkeypatch, tmp_path / "cache") as served:
        yield served


def test_base_models_are_found_by_name_or_path(tone_recipe, base_path, tmp_path, model_hub):
    experiment = tone_recipe("find", both(base_path))
    assert transfer.find_base_model(experiment.config, "ml").path == base_path
    for value, message in (
        ("no-such-model", "neither a path"),
        (str(tmp_path / "absent.pt"), "does not exist"),
        ("librispeech-streaming-2023-05-17", "get it from https://huggingface.co/Zengwei"),
    ):
        config = tone_recipe("lost", f"transfer.base_models.en={value}").config
        with pytest.raises(ValueError, match=message):
            transfer.find_base_model(config, "en")
    with pytest.raises(ValueError, match=r"transfer\.base_models\.ml is not set"):
        transfer.find_base_model(config, "ml")


@pytest.fixture
def listed(tone_recipe, base_path, tmp_path, monkeypatch, model_hub):
    """The config of an experiment on a listed model that is not there yet."""
    entry = {
        "path": str(tmp_path / "models" / "pretrained.pt"),
        "get": "https://example.org/some/model",
        "huggingface": {"repository": "some/model", "file": "exp/pretrained.pt"},
    }
    models = tmp_path / "base_models.yaml"
    models.write_text(json.dumps({"listed": entry}))
    monkeypatch.setattr(transfer, "BASE_MODELS", models)
    model_hub.files["some/model/exp/pretrained.pt"] = base_path.read_bytes()
    return tone_recipe("listed", "transfer.base_models={en: listed}").config


def test_a_listed_model_is_downloaded_once_and_its_checksum_held(listed, base_path, model_hub):
    base = transfer.find_base_model(listed, "en")
    assert base.path.read_bytes() == base_path.read_bytes()
    recorded = transfer.checksum_path(base)
    assert recorded.read_text() == f"{sha256(base_path)}  pretrained.pt\n"
    asked = len(model_hub.asked)
    transfer.find_base_model(listed, "en")
    assert len(model_hub.asked) == asked
    with base.path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match=r"changed since its download.*remove it") as error:
        transfer.find_base_model(listed, "en")
    assert sha256(base_path) in str(error.value) and str(recorded) in str(error.value)


def test_a_download_that_fails_says_what_to_do(listed, model_hub):
    model_hub.refuse = 401
    with pytest.raises(
        ValueError, match=r"some/model/exp/pretrained\.pt failed \(.*hf auth login.*; get"
    ):
        transfer.find_base_model(listed, "en")


@pytest.mark.parametrize("revision", ["", "@v1"])
def test_a_file_of_a_hub_is_kept_with_its_commit(
    revision, tone_recipe, base_path, tmp_path, monkeypatch, model_hub
):
    monkeypatch.setattr(transfer, "REPOSITORY", tmp_path)
    model_hub.files["org/name/exp/a.pt"] = base_path.read_bytes()
    name = f"hf://org/name{revision}/exp/a.pt"
    experiment = tone_recipe(f"hub{revision}", f"transfer.base_models={{ml: '{name}'}}")
    transfer.make_start(experiment)
    kept = tmp_path / "egs/base_models/hub/org/name" / (revision[1:] or "main") / "exp/a.pt"
    assert kept.read_bytes() == base_path.read_bytes()
    report = json.loads((experiment.dir / "transfer.json").read_text())["base_model"]
    assert report["name"] == "org/name" and report["licence"] == "mit"
    assert report["sha256"] == sha256(base_path)
    assert report["huggingface"] == {
        "repository": "org/name", "file": "exp/a.pt", "revision": hub.COMMIT
    }  # fmt: skip
    provenance = json.loads((experiment.dir / "provenance.json").read_text())["transfer"]
    assert provenance["base_model"] == report
    model_hub.refuse = 500  # what is here needs no hub
    assert transfer.find_base_model(experiment.config, "ml").facts["licence"] == "mit"


@pytest.mark.parametrize(
    "name", ["hf://org/a.pt", "hf://org/name/model.bin", "hf://org/name/../../a.pt", "hf://"]
)
def test_what_names_no_file_of_a_hub_is_refused(name, tone_recipe):
    config = tone_recipe("no-hub", f"transfer.base_models={{ml: '{name}'}}").config
    with pytest.raises(ValueError, match=r"write hf://ORG/NAME\[@REVISION\]/FILE\.pt"):
        transfer.find_base_model(config, "ml")


def published(folder, vocab_size, bare):
    """A repository as icefall's are published, of a thin model with the heads of the medium one.

    Returns:
        The weights in it.
    """
    thin = dataclasses.replace(
        SIZES["medium"],
        num_encoder_layers=(1,) * 6,
        encoder_dim=(16, 16, 16, 24, 16, 16),
        feedforward_dim=(32,) * 6,
        vocab_size=vocab_size,
        decoder_dim=16,
        joiner_dim=16,
        subsampling_channels=(2, 4, 8),
    )
    weights = build_transducer(thin, seed=5).state_dict()
    for place in ("exp", "data/lang_bpe"):
        (folder / place).mkdir(parents=True)
    torch.save(weights if bare else {"model": weights}, folder / "exp" / "pretrained.pt")
    pieces = ["<blk>", "<sos/eos>", "<unk>", *(f"▁p{i}" for i in range(3, vocab_size)), "#0", "#1"]
    lines = (f"{piece} {i}\n" for i, piece in enumerate(pieces))
    (folder / "data" / "lang_bpe" / "tokens.txt").write_text("".join(lines))
    return weights


LISTED = yaml.safe_load(transfer.BASE_MODELS.read_text())


@pytest.mark.parametrize("name", LISTED)
def test_every_listed_model_by_the_layout_that_it_is_published_in(
    name, tone_recipe, tmp_path, monkeypatch, model_hub
):
    entry = LISTED[name]
    at = tmp_path / "checkout" / entry["path"]
    at.parent.mkdir(parents=True)
    if name.startswith("tiny-"):  # in the repository itself
        shutil.copy(transfer.REPOSITORY / entry["path"], at)
        _, weights, _ = read_checkpoint(at)
    else:
        hosted = entry.get("huggingface", {"repository": "by-hand", "file": "exp/pretrained.pt"})
        folder = tmp_path / "hub" / hosted["repository"]
        count = re.match(r"[\d,]+", entry["tokens"])[0].replace(",", "")
        weights = published(folder, int(count), bare="huggingface" not in entry)
        checkpoint = folder / "exp" / "pretrained.pt"
        if "huggingface" in entry:
            address = f"{hosted['repository']}/{hosted['file']}"
            model_hub.files[address] = checkpoint.read_bytes()
        else:  # fetched by hand
            shutil.copy(checkpoint, at)
    monkeypatch.setattr(transfer, "REPOSITORY", tmp_path / "checkout")
    dims, new, report = start(
        tone_recipe, f"published-{name}", f"transfer.base_models={{en: {name}, ml: {name}}}"
    )
    assert report["base_model"]["name"] == name and report["base_model"]["sha256"] == sha256(at)
    assert dims.vocab_size == 30
    loaded = [key for key, entry in report["parameters"].items() if entry["fate"] == "loaded"]
    assert {part(key) for key in loaded} == {"encoder_embed", "encoder"}
    assert all(torch.equal(new[key], weights[key]) for key in loaded)
    if not name.startswith("tiny-"):
        # its own tokens.txt belongs to it, though it has two lines more
        tokens = folder / "data" / "lang_bpe" / "tokens.txt"
        own = Source.load(at, tokens).model.dims
        assert own.vocab_size == int(count) == len(tokens.read_text().splitlines()) - 2
        assert own.chunk_sizes == tuple(entry["chunk_sizes"])
        assert own.left_context_frames == tuple(entry["left_context_frames"])


def test_a_finished_stage_is_left_alone(tone_recipe, base_path):
    experiment = tone_recipe("done", "init=ml", both(base_path))
    transfer.make_start(experiment)
    written = experiment.init_checkpoint.stat().st_mtime_ns
    transfer.make_start(experiment)
    assert experiment.init_checkpoint.stat().st_mtime_ns == written
