import math

import pytest

from icetransfer.data import subset
from icetransfer.data.features import read_manifest

DURATIONS = {("a" if i % 3 else "b", f"cut-{i}"): 2.0 + i % 7 for i in range(600)}


def total(names):
    return sum(DURATIONS[name] for name in names)


def test_subsets_are_nested_and_reach_their_hours():
    chosen = [subset.select(DURATIONS, minutes / 60) for minutes in (2, 8, 30)]
    for minutes, names in zip((2, 8, 30), chosen, strict=True):
        assert minutes * 60 <= total(names) < minutes * 60 + 8
        assert total(names[:-1]) < minutes * 60
    assert chosen[1][: len(chosen[0])] == chosen[0]
    assert chosen[2][: len(chosen[1])] == chosen[1]
    assert set(subset.select(DURATIONS, None)) == set(DURATIONS)


def test_the_order_depends_on_names_alone():
    backwards = dict(reversed(DURATIONS.items()))
    assert subset.select(backwards, 0.1) == subset.select(DURATIONS, 0.1)
    chosen = subset.select(DURATIONS, 0.1)
    assert chosen != sorted(chosen)
    share = sum(corpus == "b" for corpus, _ in chosen) / len(chosen)
    assert 0.15 < share < 0.55  # a third of the cuts are b's


def test_more_hours_than_there_are_says_how_many_there_are():
    hours = total(DURATIONS) / 3600
    with pytest.raises(ValueError, match=rf"has {hours:.4g} h"):
        subset.select(DURATIONS, 2)
    with pytest.raises(ValueError, match="0 usable"):
        subset.select({}, None)


def test_the_stage_writes_usable_cuts_whatever_the_seed_and_the_init(tone_recipe):
    first = tone_recipe("one", "hours=0.5min", "seed=1", "init=en")
    second = tone_recipe("two", "hours=0.5min", "seed=2", "init=ml")
    subset.make_subset(first)
    path = subset.subset_path(first)
    assert path.name == "subset-0.5min.txt"
    written = path.read_text()
    path.unlink()
    subset.make_subset(second)
    assert subset.subset_path(second) == path and path.read_text() == written
    cuts = {
        cut.id: cut.duration for cut in read_manifest(first.manifests_dir / "tones_train.jsonl.gz")
    }
    names = subset.read_subset(path)
    assert {corpus for corpus, _ in names} == {"tones"}
    # exact in any order: a set's order, and with it a plain sum's last bit, differs by process
    assert 30 <= math.fsum(cuts[cut_id] for _, cut_id in names) < 32


def test_cuts_outside_the_length_limits_are_not_counted(tone_recipe):
    experiment = tone_recipe("long")
    limited = experiment.config.model_copy(
        update={"data": experiment.config.data.model_copy(update={"max_seconds": 1.0})}
    )
    short = type(experiment)(experiment.dir, limited)
    cuts = read_manifest(experiment.manifests_dir / "tones_train.jsonl.gz")
    expected = {("tones", cut.id) for cut in cuts if cut.duration <= 1.0}
    assert 0 < len(expected) < len(cuts)
    # the data folder is shared: another test may have left the list of the unlimited subset
    subset.subset_path(short).unlink(missing_ok=True)
    subset.make_subset(short)
    assert subset.read_subset(subset.subset_path(short)) == expected
    subset.subset_path(short).unlink()
