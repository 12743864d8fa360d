import functools
import http.server
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from icetransfer import config
from icetransfer.config import SpecAugment, load_config, load_section
from icetransfer.data import blocks, features, loader
from icetransfer.data.augment import augment, make_transform
from icetransfer.data.blocks import hold_blocks, mixed_data, open_blocks, parsed, training_data
from icetransfer.data.loader import (
    Collator,
    Order,
    Shares,
    TrainLoader,
    dev_batches,
    dev_cuts,
)
from icetransfer.data.subset import make_subset, read_subset, subset_path
from icetransfer.data.surroundings import Augmenter
from icetransfer.data.tokenizer import Tokenizer
from icetransfer.experiment import create_experiment
from icetransfer.settings.augment import NAMED
from tests.unit.conftest import base_overrides, make_cut, write_split


@pytest.fixture(scope="module")
def experiment(tone_recipe):
    made = tone_recipe("loader")
    make_subset(made)
    return made


@pytest.fixture(scope="module")
def tokenizer(experiment):
    return Tokenizer(experiment.lang_dir / "bpe.model")


@pytest.fixture(scope="module")
def whole(experiment):
    """One block of all cuts."""
    hold_blocks(experiment)
    return open_blocks(training_data(experiment), experiment.config.train.shar)


@pytest.fixture(scope="module")
def pieces(experiment, tone_recipe):
    """The same cuts in a dozen blocks."""
    made = tone_recipe("pieces")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_CUTS", 10)
        hold_blocks(made)
    return open_blocks(training_data(made), made.config.train.shar)


@pytest.fixture(scope="module")
def cuts(whole):
    return [parsed(cut) for cut in whole.read(0)]


def make_loader(some_blocks, tokenizer, batch_seconds, seed, workers=0, **settings):
    order = Order(some_blocks, batch_seconds, seed, **settings)
    return TrainLoader([order], Collator(tokenizer), workers=workers)


def take(batches, count):
    return [batch for _, batch in zip(range(count), batches, strict=False)]


def epochs(train_loader, count):
    """The ids of each batch of the first epochs."""
    ids = {}
    for batch in train_loader:
        if train_loader.epoch == count:
            return list(ids.values())
        ids.setdefault(train_loader.epoch, []).append(batch.ids)
    raise AssertionError("an endless loader ended")


@pytest.mark.parametrize("batch_seconds", [5.0, 60.0])  # with buckets, and too few cuts for them
@pytest.mark.parametrize("kind", ["whole", "pieces"])
def test_an_epoch_has_every_cut_once_in_batches_of_the_size(
    cuts, tokenizer, batch_seconds, kind, request
):
    some_blocks = request.getfixturevalue(kind)
    for epoch in epochs(make_loader(some_blocks, tokenizer, batch_seconds, seed=1), 2):
        ids = [name for batch in epoch for name in batch]
        assert sorted(ids) == sorted(cut.id for cut in cuts)
    durations = {cut.id: cut.duration for cut in cuts}
    for batch in epoch:
        assert sum(durations[name] for name in batch) <= batch_seconds


def test_the_order_depends_on_the_seed_alone(whole, pieces, tokenizer):
    for some_blocks in (whole, pieces):
        first = epochs(make_loader(some_blocks, tokenizer, 5, seed=1), 3)
        again = epochs(make_loader(some_blocks, tokenizer, 5, seed=1, workers=2), 3)
        other = epochs(make_loader(some_blocks, tokenizer, 5, seed=2), 3)
        assert first == again
        assert first[0] != first[1] != first[2]
        assert first != other and first[1] != other[0]


@pytest.mark.parametrize("kind, workers", [("whole", 0), ("pieces", 0), ("pieces", 2)])
@pytest.mark.parametrize("done", [3, 20, 45])
def test_resumes_exactly_where_it_was(kind, workers, tokenizer, done, request):
    some_blocks = request.getfixturevalue(kind)
    undisturbed = take(make_loader(some_blocks, tokenizer, 5, seed=1), done + 20)
    before = make_loader(some_blocks, tokenizer, 5, seed=1, workers=workers)
    take(before, done)
    after = make_loader(some_blocks, tokenizer, 5, seed=1)
    after.load_state_dict(before.state_dict())
    for expected, batch in zip(undisturbed[done:], after, strict=False):
        assert batch.ids == expected.ids
        assert torch.equal(batch.features, expected.features)


def test_the_place_of_an_earlier_version_is_the_same_place(whole, tokenizer):
    first, after = (make_loader(whole, tokenizer, 5, seed=1) for _ in range(2))
    expected = take(first, 30)
    place = first.state_dict()["places"][0]
    after.load_state_dict({"epoch": place["epoch"], "batch": place["batch"] - 3, "shares": 1})
    assert [batch.ids for batch in take(after, 3)] == [batch.ids for batch in expected[27:]]


def test_going_on_reads_one_block_and_no_features_of_what_is_done(pieces, tokenizer, monkeypatch):
    read, loaded = [], []
    inner_read, inner_load = blocks.Blocks.read, loader.load_features
    monkeypatch.setattr(
        blocks.Blocks, "read", lambda self, number: read.append(number) or inner_read(self, number)
    )
    monkeypatch.setattr(
        loader, "load_features", lambda cut: loaded.append(cut.id) or inner_load(cut)
    )
    place = loader.Place(epoch=3, block=5, batch=1)
    after = make_loader(pieces, tokenizer, 5, seed=1)
    after.load_state_dict({"places": [vars(place)], "shares": 1})
    batch = next(iter(after))
    assert pieces.count > 8 and len(read) == 1
    assert tuple(loaded) == batch.ids


def test_blocks_hold_the_same_whatever_the_order_of_the_manifests(pieces, whole, cuts):
    every = [cut.id for number in range(pieces.count) for cut in pieces.read(number)]
    assert sorted(every) == [cut.id for cut in cuts] and pieces.cuts == whole.cuts == 108
    assert pieces.seconds == pytest.approx(whole.seconds)
    sizes = [len(pieces.read(number)) for number in range(pieces.count)]
    assert max(sizes) < 25  # hashed evenly
    frames = {blocks.num_frames(cut) for cut in whole.read(0)}
    assert frames == {cut.num_frames for cut in cuts}


def rot(path, damage):
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_a_damaged_block_is_made_again(tone_recipe, monkeypatch, caplog, damage):
    monkeypatch.setattr(blocks, "BLOCK_CUTS", 10)
    made = tone_recipe(f"rot-{damage}")
    hold_blocks(made)
    opened = open_blocks(training_data(made))
    before = [[cut.id for cut in opened.read(number)] for number in range(opened.count)]
    path = made.dir / "train_data" / "block-00003.jsonl.gz"
    content = path.read_bytes()
    rot(path, damage)
    after = [[cut.id for cut in opened.read(number)] for number in range(opened.count)]
    assert f"{path} is damaged: it is made again" in caplog.text
    assert before == after and path.read_bytes() == content
    assert not [each for each in made.dir.iterdir() if "partial" in each.name]


def test_a_damaged_block_whose_features_changed_is_an_error(tone_recipe, tone_data, monkeypatch):
    made = tone_recipe("rot-for-good")
    hold_blocks(made)
    opened = open_blocks(training_data(made))
    rot(made.dir / "train_data" / "block-00000.jsonl.gz", "cut")
    manifest = tone_data / "manifests" / "tones_train_fbank.jsonl.gz"
    kept = manifest.read_bytes()
    try:
        features.write_manifest(features.read_manifest(manifest)[1:], manifest)
        with pytest.raises(ValueError, match=r"block-00000.*damaged.*tones_train_fbank.*changed"):
            opened.read(0)
        manifest.unlink()
        with pytest.raises(ValueError, match=r"block-00000.*cannot be made again.*does not exist"):
            opened.read(0)
    finally:
        manifest.write_bytes(kept)
    assert opened.read(0)


def test_blocks_of_an_earlier_version_get_their_digests(tone_recipe):
    made = tone_recipe("format-1")
    hold_blocks(made)
    path = made.dir / "train_data" / "index.json"
    current = path.read_text()
    index = json.loads(current)
    old = index | {"blocks": len(index["blocks"])}
    path.write_text(json.dumps({key: old[key] for key in old if key not in ("format", "size")}))
    hold_blocks(made)
    assert path.read_text() == current


def test_a_shar_that_is_cut_short_is_named(tone_recipe, tmp_path):
    made = tone_recipe("rot-shar", f"train.shar={tmp_path / 'shar'}")
    hold_blocks(made)
    rot(tmp_path / "shar" / "features.000000.tar", "cut")
    with pytest.raises(ValueError, match=r"features\.000000\.tar does not hold the features of"):
        open_blocks(training_data(made), made.config.train.shar).read(0)


def test_a_shar_gives_the_same_batches(pieces, tone_recipe, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "SHAR_BLOCK_CUTS", 10)
    made = tone_recipe("shar", f"train.shar={tmp_path / 'shar'}")
    hold_blocks(made)
    for reader in (
        open_blocks(training_data(made), made.config.train.shar),
        served(made, tmp_path, tone_recipe, monkeypatch),
    ):
        expected = take(make_loader(pieces, tokenizer, 5, seed=1), 20)
        found = take(make_loader(reader, tokenizer, 5, seed=1, workers=1), 20)
        for one, two in zip(expected, found, strict=True):
            assert one.ids == two.ids and torch.equal(one.features, two.features)


def served(made, tmp_path, tone_recipe, monkeypatch):
    """The blocks whose Shar comes from a web server; the stored features are out of reach."""
    handler = functools.partial(QuietHandler, directory=tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(blocks, "_write_shard", None)
    address = f"http://127.0.0.1:{server.server_port}/shar"
    far = tone_recipe("far", f"train.shar={address}")
    hold_blocks(far)
    return open_blocks(training_data(far), far.config.train.shar)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_a_shar_of_other_data_or_nowhere_is_refused(experiment, tone_recipe, tmp_path):
    made = tone_recipe("othershar", f"train.shar={tmp_path}")
    (tmp_path / "index.json").write_text('{"sources": {}}')
    with pytest.raises(ValueError, match="holds the features of other data"):
        hold_blocks(made)
    with pytest.raises(ValueError, match=r"no index\.json can be read there"):
        hold_blocks(tone_recipe("noshar", "train.shar=http://127.0.0.1:9/shar"))


def test_short_cuts_are_joined_with_their_texts(whole, cuts, tokenizer):
    by_id = {cut.id: cut for cut in cuts}
    plain = take(make_loader(whole, tokenizer, 10, seed=1), 12)
    joined = take(make_loader(whole, tokenizer, 10, seed=1, join_seconds=3), 12)
    assert any("+" in name for batch in joined for name in batch.ids)
    for one, two in zip(plain, joined, strict=True):
        assert "+".join(two.ids).split("+") == list(one.ids)
        for row, name in enumerate(two.ids):
            parts = [by_id[part] for part in name.split("+")]
            assert len(parts) == 1 or sum(part.duration for part in parts) <= 3
            joint = np.concatenate([part.load_features() for part in parts])
            np.testing.assert_array_equal(two.features[row, : len(joint)], joint)
            assert two.texts[row] == " ".join(part.supervisions[0].text for part in parts)
            ids = two.tokens[row, : two.token_lens[row]].tolist()
            assert tokenizer.decode(ids) == two.texts[row]


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """Another recipe's data folder: two recordings, with letters that the tokens lack."""
    audio = (0.1 * np.random.default_rng(1).standard_normal(16000)).astype(np.float32)
    folder = tmp_path / "xx" / "data"
    folder.parent.mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(folder.parent)
        data = Path("data")
        cuts = [
            make_cut(data / "audio" / f"{n}.flac", t, audio)
            for n, t in (("a", "één ñ"), ("b", "zes"))
        ]
        for split in ("train", "dev", "test"):
            write_split(data, split, cuts if split == "train" else [])
        prepared = create_experiment(Path("exp"), load_config([], base_overrides(data)))
        features.compute_features(prepared)
    return folder


def test_a_share_of_each_batch_is_another_recipes(whole, tone_recipe, tokenizer, foreign, caplog):
    mixed = tone_recipe(
        "mixed", f"train.mix.data={foreign}", "train.mix.share=0.4", "train.batch_seconds=10"
    )
    with caplog.at_level("WARNING", logger="icetransfer"):
        hold_blocks(mixed)
    assert "characters outside the vocabulary, their characters left out: {" in caplog.text
    train_loader = loader.train_loader(mixed, tokenizer)
    batches = take(train_loader, 30)
    texts = {}
    for batch in batches:
        names = [name.split("_sp")[0] for name in batch.ids]
        other = [name for name in names if name in ("a", "b")]
        assert 1 <= len(other) <= 4 and len(other) < len(names)
        texts |= dict(zip(names, batch.texts, strict=True))
    assert texts["b"] == "zes" and set(texts["a"]) <= set("n") | set("één")
    after = loader.train_loader(mixed, tokenizer)
    after.load_state_dict(train_loader.state_dict())
    again = take(loader.train_loader(mixed, tokenizer), 33)
    assert [batch.ids for batch in take(after, 3)] == [batch.ids for batch in again[30:]]


def test_mixed_cuts_with_foreign_letters_can_be_left_out(tone_recipe, foreign):
    mixed = tone_recipe("mixedcuts", f"train.mix.data={foreign}", "train.mix.unknown=cuts")
    hold_blocks(mixed)
    kept = open_blocks(mixed_data(mixed)).read(0)
    assert {cut.id.split("_sp")[0] for cut in kept} == {"b"}
    with pytest.raises(ValueError, match="no data folder"):
        hold_blocks(tone_recipe("mixednone", f"train.mix.data={foreign.parent}"))


def test_pauses_are_part_of_a_steps_audio(whole, tokenizer):
    listed = load_section(
        config.Train, "train", ["train.augment=[{kind: silence, probability: 0.7}]"]
    ).augment
    augmenter = Augmenter(listed, seed=1)

    def made(workers=0):
        order = Order(whole, 10, 1, join_seconds=5, augmenter=augmenter)
        return TrainLoader([order], Collator(tokenizer, augmenter), workers=workers)

    first = take(made(), 12)
    speech = sum(batch.seconds for batch in first)
    frames = sum(int(batch.feature_lens.sum()) for batch in first)
    assert frames > 120 * speech, "pauses make rows longer"
    assert frames / 100 / 12 <= 10, "and a step holds no more audio for that"
    for one, two in zip(first, take(made(workers=2), 12), strict=True):
        torch.testing.assert_close(one.features, two.features, rtol=0, atol=0)
    resumed, stopped = made(), made()
    take(stopped, 5)
    resumed.load_state_dict(stopped.state_dict())
    for one, two in zip(first[5:], take(resumed, 7), strict=True):
        torch.testing.assert_close(one.features, two.features, rtol=0, atol=0)


def test_shares_of_a_batch_with_pauses_are_padded_as_the_whole(whole, tokenizer):
    augmenter = Augmenter(NAMED["strong"], seed=1)
    order = Order(whole, 20, 1, augmenter=augmenter)
    collate = Collator(tokenizer, augmenter)
    alone = take(TrainLoader([order], collate, Shares()), 4)
    halves = [take(TrainLoader([order], collate, Shares(2, (n,))), 4) for n in range(2)]
    for step, batch in enumerate(alone):
        assert {half[step].features.size(1) for half in halves} == {batch.features.size(1)}


def test_a_batch_holds_its_cuts_padded(whole, cuts, tokenizer):
    by_id = {cut.id: cut for cut in cuts}
    batch = next(iter(make_loader(whole, tokenizer, 60, seed=1)))
    assert batch.features.dtype == torch.float32 and batch.tokens.dtype == torch.int64
    assert batch.features.shape == (len(batch.ids), int(batch.feature_lens.max()), 80)
    assert batch.seconds == pytest.approx(sum(by_id[name].duration for name in batch.ids))
    for row, name in enumerate(batch.ids):
        frames, count = int(batch.feature_lens[row]), int(batch.token_lens[row])
        np.testing.assert_array_equal(batch.features[row, :frames], by_id[name].load_features())
        assert (batch.features[row, frames:] == np.float32(np.log(1e-10))).all()
        text = by_id[name].supervisions[0].text
        assert tokenizer.decode(batch.tokens[row, :count].tolist()) == text
        assert (batch.tokens[row, count:] == 0).all()


def test_the_subset_comes_at_every_speed(tone_recipe):
    small = tone_recipe("small", "hours=0.3min")
    make_subset(small)
    hold_blocks(small)
    wanted = {cut_id for _, cut_id in read_subset(subset_path(small))}
    found = [
        parsed(cut) for cut in open_blocks(training_data(small), small.config.train.shar).read(0)
    ]
    assert {cut.source_id for cut in found} == wanted
    assert len(found) == 3 * len(wanted)


def test_cuts_that_cannot_be_trained_on_are_left_out_with_a_reason(tokenizer):
    screen = blocks.Screen(tokenizer)
    assert not screen.text("a", "", 100)
    assert not screen.text("b", "een twee drie vier vijf zes " * 10, 100)
    assert not screen.text("c", " ", 100)
    assert screen.text("d", "een ñandú", 100) == "een ñandú"
    assert screen.messages()[:2] == [
        "left out 2 cuts with an empty transcript, such as a",
        "left out 1 cuts with more tokens than encoder frames, such as b",
    ]
    assert "ñ" in screen.messages()[2]


def test_no_cut_that_can_be_trained_on_is_an_error(tone_recipe, monkeypatch):
    made = tone_recipe("unusable")
    monkeypatch.setattr(blocks, "encoder_frames", lambda frames: 0)
    with pytest.raises(ValueError, match="none of the 108 cuts can be trained on"):
        hold_blocks(made)


def test_dev_is_the_same_every_time_and_within_its_limit(experiment, tokenizer):
    every = dev_cuts(experiment, 600)
    assert len(every) == 6
    some = dev_cuts(experiment, 2)
    assert 2 <= sum(cut.duration for cut in some) < 4
    assert {cut.id for cut in some} < {cut.id for cut in every}
    batches = dev_batches(every, tokenizer, 3)
    assert [name for batch in batches for name in batch.ids] == [cut.id for cut in every]


def test_without_dev_recordings_the_error_says_where_they_come_from(tokenizer):
    with pytest.raises(ValueError, match=r"no corpus has a dev recording.*holdout_every"):
        dev_batches([], tokenizer, 60.0)


@pytest.mark.parametrize("frames, expected", [(237, 58), (9, 1), (70, 16)])
def test_encoder_frames_are_those_of_the_model(frames, expected):
    assert blocks.encoder_frames(frames) == expected


def test_spec_augment_masks_by_the_global_seeds_and_can_be_off(whole, tokenizer):
    from icetransfer.experiment import seed_everything

    batch = next(iter(make_loader(whole, tokenizer, 60, seed=1)))
    transform = make_transform(SpecAugment())
    results = []
    for seed in (1, 1, 2):
        seed_everything(seed)
        results.append(augment(transform, batch.features, batch.feature_lens))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    changed = (results[0] != batch.features).float().mean()
    assert changed > 0.1
    assert results[0].shape == batch.features.shape
    off = make_transform(SpecAugment(enabled=False))
    assert torch.equal(augment(off, batch.features, batch.feature_lens), batch.features)
