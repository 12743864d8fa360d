import numpy as np
import pytest
import torch

from icetransfer.config import SpecAugment
from icetransfer.data import loader
from icetransfer.data.augment import augment, make_transform
from icetransfer.data.loader import TrainLoader, dev_batches, dev_cuts, train_cuts
from icetransfer.data.subset import make_subset, read_subset, subset_path
from icetransfer.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def experiment(tone_recipe):
    made = tone_recipe("loader")
    make_subset(made)
    return made


@pytest.fixture(scope="module")
def tokenizer(experiment):
    return Tokenizer(experiment.lang_dir / "bpe.model")


@pytest.fixture(scope="module")
def cuts(experiment):
    return train_cuts(experiment)


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
def test_an_epoch_has_every_cut_once_in_batches_of_the_size(cuts, tokenizer, batch_seconds):
    for epoch in epochs(TrainLoader(cuts, tokenizer, batch_seconds, seed=1), 2):
        ids = [name for batch in epoch for name in batch]
        assert sorted(ids) == sorted(cut.id for cut in cuts)
    durations = {cut.id: cut.duration for cut in cuts}
    for batch in epoch:
        assert sum(durations[name] for name in batch) <= batch_seconds


def test_the_order_depends_on_the_seed_and_not_on_the_order_given(cuts, tokenizer):
    first = epochs(TrainLoader(cuts, tokenizer, 5, seed=1), 3)
    again = epochs(TrainLoader(cuts[::-1], tokenizer, 5, seed=1), 3)
    other = epochs(TrainLoader(cuts, tokenizer, 5, seed=2), 3)
    assert first == again
    assert first[0] != first[1] != first[2]
    assert first != other and first[1] != other[0]


@pytest.mark.parametrize("done", [3, 20, 45])
def test_resumes_exactly_where_it_was(cuts, tokenizer, done):
    undisturbed = take(TrainLoader(cuts, tokenizer, 5, seed=1), done + 20)
    before = TrainLoader(cuts, tokenizer, 5, seed=1)
    take(before, done)
    after = TrainLoader(cuts, tokenizer, 5, seed=1)
    after.load_state_dict(before.state_dict())
    for expected, batch in zip(undisturbed[done:], after, strict=False):
        assert batch.ids == expected.ids
        assert torch.equal(batch.features, expected.features)


def test_a_batch_holds_its_cuts_padded(cuts, tokenizer):
    by_id = {cut.id: cut for cut in cuts}
    batch = next(iter(TrainLoader(cuts, tokenizer, 60, seed=1)))
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
    wanted = {cut_id for _, cut_id in read_subset(subset_path(small))}
    found = train_cuts(small)
    assert {cut.source_id for cut in found} == wanted
    assert len(found) == 3 * len(wanted)


def test_cuts_that_cannot_be_trained_on_are_left_out_with_a_reason(cuts, tokenizer, caplog):
    from lhotse.utils import fastcopy

    def with_text(cut, text):
        return fastcopy(cut, supervisions=[fastcopy(cut.supervisions[0], text=text)])

    empty = with_text(cuts[0], "")
    long = with_text(cuts[1], "een twee drie vier vijf zes " * 10)
    strange = with_text(cuts[2], "een ñandú")
    with caplog.at_level("WARNING", logger="icetransfer"):
        kept = loader.usable_cuts([empty, long, strange, cuts[3]], tokenizer)
    assert [cut.id for cut in kept] == [cuts[2].id, cuts[3].id]
    assert f"1 cuts with an empty transcript, such as {cuts[0].id}" in caplog.text
    assert f"1 cuts with more tokens than encoder frames, such as {cuts[1].id}" in caplog.text
    assert "ñ" in caplog.text
    with pytest.raises(ValueError, match="none of the 1 cuts"):
        TrainLoader([empty], tokenizer, 5, seed=1)


def test_dev_is_the_same_every_time_and_within_its_limit(experiment, tokenizer):
    every = dev_cuts(experiment, 600)
    assert len(every) == 6
    some = dev_cuts(experiment, 2)
    assert 2 <= sum(cut.duration for cut in some) < 4
    assert {cut.id for cut in some} < {cut.id for cut in every}
    batches = dev_batches(every, tokenizer, 3)
    assert [name for batch in batches for name in batch.ids] == [cut.id for cut in every]


@pytest.mark.parametrize("frames, expected", [(237, 58), (9, 1), (70, 16)])
def test_encoder_frames_are_those_of_the_model(frames, expected):
    assert loader.encoder_frames(frames) == expected


def test_spec_augment_masks_by_the_global_seeds_and_can_be_off(cuts, tokenizer):
    from icetransfer.experiment import seed_everything

    batch = next(iter(TrainLoader(cuts, tokenizer, 60, seed=1)))
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
