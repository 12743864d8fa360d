import json
import math
import tracemalloc

import numpy as np
import pytest
from lhotse import MonoCut, Recording, SupervisionSegment

from icetransfer.data import subset
from icetransfer.data.features import read_manifest, write_manifest
from icetransfer.experiment import Experiment

DURATIONS = {("a" if i % 3 else "b", f"cut-{i}"): 2.0 + i % 7 for i in range(600)}


def make_cut(path, text, samples):
    """A cut of audio that is not read."""
    source = {"type": "file", "channels": [0], "source": str(path)}
    recording = Recording.from_dict({
        "id": path.stem, "sources": [source], "sampling_rate": 16000,
        "num_samples": len(samples), "duration": len(samples) / 16000,
    })  # fmt: skip
    segment = SupervisionSegment(path.stem, path.stem, 0, recording.duration, text=text)
    return MonoCut(path.stem, 0, recording.duration, 0, recording=recording, supervisions=[segment])


def columns(durations):
    """The cuts of (corpus, id): seconds as candidates; a corpus's stand together, as in a run."""
    candidates = subset.Candidates()
    for (corpus, cut_id), seconds in sorted(durations.items(), key=lambda item: item[0][0]):
        candidates.add(corpus, cut_id, seconds, subset.order_key(corpus, cut_id))
    return candidates


def select(durations, hours):
    """The names that are taken of (corpus, id): seconds."""
    candidates = columns(durations)
    return [candidates.name(row) for row in subset.select(candidates, hours)]


def total(names):
    return sum(DURATIONS[name] for name in names)


def test_subsets_are_nested_and_reach_their_hours():
    chosen = [select(DURATIONS, minutes / 60) for minutes in (2, 8, 30)]
    for minutes, names in zip((2, 8, 30), chosen, strict=True):
        assert minutes * 60 <= total(names) < minutes * 60 + 8
        assert total(names[:-1]) < minutes * 60
    assert chosen[1][: len(chosen[0])] == chosen[0]
    assert chosen[2][: len(chosen[1])] == chosen[1]
    assert set(select(DURATIONS, None)) == set(DURATIONS)


def test_the_order_depends_on_names_alone():
    backwards = dict(reversed(DURATIONS.items()))
    assert select(backwards, 0.1) == select(DURATIONS, 0.1)
    chosen = select(DURATIONS, 0.1)
    assert chosen != sorted(chosen)
    share = sum(corpus == "b" for corpus, _ in chosen) / len(chosen)
    assert 0.15 < share < 0.55  # a third of the cuts are b's


def test_one_corpus_is_taken_in_the_order_of_the_names_hashes():
    one = {name: seconds for name, seconds in DURATIONS.items() if name[0] == "a"}
    by_hash = sorted(one, key=lambda name: subset.order_key(*name))
    assert select(one, None) == by_hash
    assert select(one, 0.2) == by_hash[: len(select(one, 0.2))]
    # what the mini preset has trained on: may not change
    names = [cut_id for _, cut_id in by_hash]
    assert names[:5] == ["cut-461", "cut-73", "cut-283", "cut-500", "cut-389"]


@pytest.mark.parametrize("hours", [0.05, 0.1, 0.3, 0.6])
def test_every_corpus_gives_the_same_share(hours):
    shares = []
    for corpus in ("a", "b"):
        there = sum(s for (name, _), s in DURATIONS.items() if name == corpus)
        given = sum(DURATIONS[n] for n in select(DURATIONS, hours) if n[0] == corpus)
        shares.append(given / there)
    assert shares[0] == pytest.approx(shares[1], abs=0.02)


def test_speakers_give_their_share_but_for_chance():
    durations = {("a", f"spk{i % 5}-{i}"): 3.0 + i % 4 for i in range(20000)}
    taken = select(durations, 3)
    counts = [sum(name[1].startswith(f"spk{s}-") for name in taken) for s in range(5)]
    expected = len(taken) / 5
    assert max(abs(count - expected) for count in counts) < 3 * expected**0.5


def with_corpus(experiment, name, splits):
    """The experiment with a second corpus, whose manifests are made of the first one's cuts."""
    for split, cuts in splits.items():
        write_manifest(cuts, experiment.manifests_dir / f"{name}_{split}.jsonl.gz")
        for cut in cuts:
            cut.custom = {"source_id": cut.id}
        write_manifest(cuts, experiment.manifests_dir / f"{name}_{split}_fbank.jsonl.gz")
    corpora = experiment.config.data.corpora | {name: experiment.config.data.corpora["tones"]}
    data = experiment.config.data.model_copy(update={"corpora": corpora})
    return type(experiment)(experiment.dir, experiment.config.model_copy(update={"data": data}))


def taken_one_by_one(durations, hours):
    """What `select` takes, said with objects as the version of before columns did."""
    placed = []
    for corpus in {name[0] for name in durations}:
        names = sorted(name for name in durations if name[0] == corpus)
        whole, before = sum(durations[name] for name in names), 0.0
        for name in sorted(names, key=lambda name: subset.order_key(*name)):
            placed.append((before / whole, subset.order_key(*name), name))
            before += durations[name]
    taken, seconds = [], 0.0
    for _, _, name in sorted(placed):
        if seconds >= hours * 3600:
            break
        taken.append(name)
        seconds += durations[name]
    return taken


def test_columns_give_what_objects_gave():
    rng = np.random.default_rng(3)
    durations = {
        (str(corpus), f"cut-{number}-ĳ"): float(seconds)
        for number, (corpus, seconds) in enumerate(
            zip(
                rng.choice(["mls", "cv", "vox"], 3000, p=[0.7, 0.2, 0.1]),
                rng.uniform(0.5, 30, 3000),
                strict=True,
            )
        )
    }
    for hours in (0.01, 0.5, 2, 7, 12.3):
        assert select(durations, hours) == taken_one_by_one(durations, hours)
    assert select(durations, None) == taken_one_by_one(durations, 1e9)


def test_a_candidate_costs_bytes_not_objects():
    cuts = {("corpus", f"common_voice_nl_{number:08d}"): 5.0 for number in range(20_000)}
    tracemalloc.start()
    candidates = columns(cuts)
    taken = subset.select(candidates, 20)
    bytes_each = tracemalloc.get_traced_memory()[0] / len(candidates)
    tracemalloc.stop()
    assert len(taken) == 20 * 3600 / 5
    assert bytes_each < 130


def test_what_another_corpus_tests_on_is_not_trained_on(tone_recipe, caplog):
    experiment = tone_recipe("held")
    first = read_manifest(experiment.manifests_dir / "tones_train.jsonl.gz")
    copied = read_manifest(experiment.manifests_dir / "tones_train.jsonl.gz")[1]
    copied.recording.sources[0].source = "/elsewhere/copy.flac"  # the same, in another place
    fresh = make_cut(experiment.dir / "fresh.flac", first[5].supervisions[0].text, np.ones(16000))
    both = with_corpus(experiment, "other", {
        "train": [fresh], "dev": [first[0]], "test": [copied, first[2]],
    })  # fmt: skip
    subset.subset_path(both).unlink(missing_ok=True)
    subset.make_subset(both)
    taken = subset.read_subset(subset.subset_path(both))
    assert {("tones", cut.id) for cut in first[:3]}.isdisjoint(taken)
    assert len(taken) == len(first) - 3 + 1
    summary = json.loads(subset.subset_path(both).with_suffix(".json").read_text())
    assert summary["in_dev_or_test"] == 3
    assert summary["corpora"]["other"]["recordings"] == 1
    assert "3 training recordings are in a dev or test split too" in caplog.text
    subset.subset_path(both).unlink()


def test_sentences_of_test_sets_are_counted(tone_recipe, caplog):
    experiment = tone_recipe("repeats")
    first = read_manifest(experiment.manifests_dir / "tones_train.jsonl.gz")
    text = first[4].supervisions[0].text
    repeats = sum(cut.supervisions[0].text == text for cut in first)
    said_again = make_cut(experiment.dir / "again.flac", text, np.ones(16000))
    both = with_corpus(experiment, "spoken", {"train": [], "dev": [], "test": [said_again]})
    subset.subset_path(both).unlink(missing_ok=True)
    subset.make_subset(both)
    summary = json.loads(subset.subset_path(both).with_suffix(".json").read_text())
    assert summary["sentences_in_test_sets"]["spoken"] == repeats
    assert f"{repeats} training recordings have a sentence of the test set spoken" in caplog.text
    assert len(subset.read_subset(subset.subset_path(both))) == len(first)
    subset.subset_path(both).unlink()


def test_speakers_and_sentences_are_kept_apart_on_request(tone_recipe, caplog):
    experiment = tone_recipe("apart")
    first = read_manifest(experiment.manifests_dir / "tones_train.jsonl.gz")
    text = first[4].supervisions[0].text
    spoken = {
        (name, of): make_cut(experiment.dir / f"{name}-{of}.flac", said, np.ones(16000))
        for name, of, said in (
            *(("train", "anna", "een"), ("train", "ben", text), ("train", "", "twee twee")),
            *(("dev", "anna", "drie"), ("test", "", text)),
        )
    }
    for (_, speaker), cut in spoken.items():
        cut.supervisions[0].speaker = speaker or "unknown"
    splits = {split: [c for (s, _), c in spoken.items() if s == split] for split in ("dev", "test")}
    splits["train"] = [cut for (split, _), cut in spoken.items() if split == "train"]
    both = with_corpus(experiment, "voices", splits)

    def taken(*kinds):
        data = both.config.data.model_copy(update={"keep_apart": kinds})
        asked = Experiment(both.dir, both.config.model_copy(update={"data": data}))
        subset.make_subset(asked)
        summary = json.loads(subset.subset_path(asked).with_suffix(".json").read_text())
        names = {
            cut
            for corpus, cut in subset.read_subset(subset.subset_path(asked))
            if corpus == "voices"
        }
        return names, summary["speakers_in_dev_or_test"]

    anna, ben, unknown = "train-anna", "train-ben", "train-"
    with caplog.at_level("WARNING", logger="icetransfer"):
        assert taken() == ({anna, ben, unknown}, 1)
    assert "1 training recordings are of speakers of a dev or test split" in caplog.text
    assert taken("speakers") == ({ben, unknown}, 0), "two unknown speakers need not be the same"
    assert taken("sentences") == ({anna, unknown}, 1)
    assert taken("speakers", "sentences") == ({unknown}, 0)
    subset.subset_path(both).unlink()


def test_more_hours_than_there_are_says_how_many_there_are():
    hours = total(DURATIONS) / 3600
    with pytest.raises(ValueError, match=rf"has {hours:.4g} h .* \(a 0\.\d+ h, b 0\.\d+ h\): ask"):
        select(DURATIONS, 2)
    with pytest.raises(ValueError, match="0 usable"):
        select({}, None)


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
