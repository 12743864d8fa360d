"""Published corpora in their own layout, from stage 0 to filter banks, mistakes included."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from icetransfer.config import load_config
from icetransfer.data import corpora, download, features, subset, tokenizer
from icetransfer.data.features import read_manifest
from icetransfer.data.published import PUBLISHED, name_of
from icetransfer.data.utterances import SPLITS
from icetransfer.experiment import Experiment, create_experiment
from icetransfer.settings.corpora import Cuts

TEXTS = {
    "de": ("guten morgen wie geht es", "am dritten mai fahren wir los", "das kostet fünf euro",
           "die sonne scheint heute", "um vierzehn uhr dreißig ist schluss"),
    "nl": ("goedemorgen hoe gaat het", "op drie mei gaan we weg", "dat kost vijf euro",
           "de zon schijnt vandaag", "om veertien uur dertig is het klaar"),
    "pl": ("dzień dobry jak się masz", "zaczynamy trzeciego maja", "to kosztuje pięć złotych",
           "dziś świeci słońce", "kończymy o czternastej trzydzieści"),
    "ro": ("bună ziua ce mai faci", "plecăm pe trei mai", "asta costă cinci lei",
           "astăzi este soare", "terminăm la paisprezece și treizeci"),
}  # fmt: skip


def run_stages(tmp_path: Path, language: str, corpus: dict[str, Any]) -> Experiment:
    """Stages 0 to 4 of a recipe with one corpus, named "c"."""
    settings = [
        f"language={language}",
        f"data.dir={tmp_path / 'data'}",
        f"data.corpora={json.dumps({'c': corpus})}",
        "data.vocab_size=60",
        "data.features={jobs: 1, speeds: [1.0]}",
    ]
    experiment = create_experiment(tmp_path / "exp", load_config([], settings))
    download.download(experiment)
    corpora.prepare(experiment)
    features.compute_features(experiment)
    subset.make_subset(experiment)
    tokenizer.make_tokenizer(experiment)
    return experiment


def texts(experiment: Experiment) -> dict[str, list[str]]:
    """The text of every cut that has features, by split."""
    found = {}
    for split in SPLITS:
        cuts = read_manifest(experiment.manifests_dir / f"c_{split}_fbank.jsonl.gz")
        assert all(cut.load_features().shape == (cut.num_frames, 80) for cut in cuts)
        found[split] = [cut.supervisions[0].text for cut in cuts]
    return found


def rejected(experiment: Experiment) -> list[tuple[str, str]]:
    """Id and reason of what was left out."""
    lines = (experiment.manifests_dir / "c_rejected.tsv").read_text().splitlines()[1:]
    assert all(len(line.split("\t")) == 4 for line in lines)
    cells = [line.split("\t") for line in lines]
    return [(name, reason.partition(": in training")[0]) for name, _, reason, _ in cells]


@pytest.mark.parametrize("language", ["pl", "ro"])
def test_common_voice(
    tmp_path: Path, language: str, make_common_voice: Callable[[Path, str], Path]
) -> None:
    root = make_common_voice(tmp_path / "cv", language)
    corpus = {"kind": "common_voice", "path": str(root)}
    experiment = run_stages(tmp_path, language, corpus)
    expected = TEXTS[language]
    assert texts(experiment) == {
        "train": list(expected[:2]), "dev": [expected[3]], "test": [expected[4]],
    }  # fmt: skip
    reasons = rejected(experiment)
    names = [f"common_voice_{language}_{number}" for number in (2, 0, 70, 71, 72)]
    assert [name for name, _ in reasons] == [*names, "train.tsv:9"]
    wanted = ("truncated|not readable", "duplicate id", "no such file", "empty transcript",
              "alphabet: 京 東", "3 tab-separated columns")  # fmt: skip
    for (_, reason), parts in zip(reasons, wanted, strict=True):
        assert any(part in reason for part in parts.split("|")), reason
    cut = read_manifest(experiment.manifests_dir / "c_test.jsonl.gz")[0]
    assert cut.recording.num_channels == 1 and cut.sampling_rate == 16_000
    assert cut.supervisions[0].speaker == "speaker-4"


def test_common_voice_validated_keeps_dev_and_test_speakers_out(
    tmp_path: Path, make_common_voice: Callable[[Path, str], Path]
) -> None:
    corpus = {"kind": "common_voice", "train": "validated"}
    make_common_voice(tmp_path / "data/corpus/c", "nl")  # where stage 0 looks
    experiment = run_stages(tmp_path, "nl", corpus)
    speakers = {
        cut.supervisions[0].speaker
        for cut in read_manifest(experiment.manifests_dir / "c_train.jsonl.gz")
    }
    assert speakers == {"speaker-0", "speaker-1"}


def test_common_voice_says_exactly_what_to_bring(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)language 'nl'.*cv-corpus-\.\.\.-nl\.tar\.gz") as e:
        run_stages(tmp_path, "nl", {"kind": "common_voice"})
    assert str(tmp_path / "data/corpus/c") in str(e.value)
    assert PUBLISHED["common_voice"].site in str(e.value)


def test_clip_durations_uncover_a_clip_that_lost_its_end(
    tmp_path: Path, make_common_voice: Callable[[Path, str], Path]
) -> None:
    root = make_common_voice(tmp_path / "cv", "nl")
    durations = root / "cv-corpus-99.0-2026-09-01/nl/clip_durations.tsv"
    durations.write_text("clip\tduration[ms]\ncommon_voice_nl_1.mp3\t9000\n")
    experiment = run_stages(tmp_path, "nl", {"kind": "common_voice", "path": str(root)})
    assert texts(experiment)["train"] == [TEXTS["nl"][0]]
    reasons = dict(rejected(experiment))
    assert "of 9.000 s that the corpus promises" in reasons["common_voice_nl_1"]


@pytest.mark.parametrize(("language", "name"), [("nl", "dutch"), ("pl", "polish")])
@pytest.mark.parametrize("codec", ["flac", "opus"])
def test_mls(
    tmp_path: Path,
    language: str,
    name: str,
    codec: str,
    make_mls: Callable[[Path, str, str, str], Path],
) -> None:
    root = make_mls(tmp_path / "mls", language, name, codec)
    experiment = run_stages(tmp_path, language, {"kind": "mls", "path": str(root), "codec": codec})
    found = texts(experiment)
    assert [len(found[split]) for split in SPLITS] == [3, 1, 1]
    assert found["dev"] == [TEXTS[language][3]]
    cut = read_manifest(experiment.manifests_dir / "c_test.jsonl.gz")[0]
    assert cut.id == "104_204_000004" and cut.supervisions[0].speaker == "104"
    assert cut.recording.sources[0].source.endswith(f"test/audio/104/204/{cut.id}.{codec}")
    reasons = rejected(experiment)
    for_each_split = ["1 tab-separated columns", "duplicate id", "empty transcript", "no such file"]
    # of an id that stands in three splits, only the first is looked at
    assert sorted(reason for _, reason in reasons) == sorted(
        [*for_each_split, *["duplicate id"] * 6, *["1 tab-separated columns"] * 2]
    )


@pytest.mark.parametrize(("language", "locale"), [("de", "de_de"), ("ro", "ro_ro")])
def test_fleurs(
    tmp_path: Path, language: str, locale: str, make_fleurs: Callable[[Path, str, str], Path]
) -> None:
    root = make_fleurs(tmp_path / "fleurs", language, locale)
    experiment = run_stages(tmp_path, language, {"kind": "fleurs", "path": str(root)})
    expected = TEXTS[language]
    assert texts(experiment) == {
        "train": list(expected[:3]), "dev": [expected[3]], "test": [expected[4]],
    }  # fmt: skip
    reasons = rejected(experiment)
    assert [name for name, _ in reasons] == ["9999", "1004", "9999", "1003", "9999", "1000"]
    assert {reason for _, reason in reasons} == {"no such file", "duplicate id"}


@pytest.mark.parametrize(("language", "suffix"), [("nl", "ogg"), ("ro", "wav")])
def test_voxpopuli(
    tmp_path: Path, language: str, suffix: str, make_voxpopuli: Callable[[Path, str, str], Path]
) -> None:
    root = make_voxpopuli(tmp_path / "vox", language, suffix)
    experiment = run_stages(tmp_path, language, {"kind": "voxpopuli", "path": str(root)})
    expected = TEXTS[language]
    assert texts(experiment) == {
        "train": list(expected[:3]), "dev": [expected[3]], "test": [expected[4]],
    }  # fmt: skip
    first = read_manifest(experiment.manifests_dir / "c_train.jsonl.gz")[0]
    assert first.supervisions[0].speaker == "unknown"
    assert {reason for _, reason in rejected(experiment)} == {
        "no such file", "empty transcript", "duplicate id",
    }  # fmt: skip


def test_json_lines(tmp_path: Path, make_json_lines: Callable[[Path, str], Path]) -> None:
    manifest = make_json_lines(tmp_path / "nemo", "nl")
    packed = manifest.with_name("test.jsonl.gz")
    first, *others = manifest.read_bytes().splitlines()
    packed.write_bytes(gzip.compress(first))
    corpus = {"kind": "jsonl", "train": [str(manifest)], "test": [str(packed)]}
    with pytest.raises(ValueError, match=r"1 training recordings are in a dev or test split too"):
        run_stages(tmp_path, "nl", corpus)
    manifest.write_bytes(b"\n".join([*others, others[0]]))
    experiment = run_stages(tmp_path, "nl", corpus)
    found = texts(experiment)
    assert found["test"] == [TEXTS["nl"][0]]
    assert found["train"] == [TEXTS["nl"][1], *TEXTS["nl"]]
    assert found["dev"] == []
    cuts = read_manifest(experiment.manifests_dir / "c_train.jsonl.gz")
    parts = [cut for cut in cuts if cut.supervisions[0].speaker == "anna"]
    assert parts[0].start == 0 and parts[1].start == pytest.approx(parts[0].duration)
    assert parts[1].load_audio().shape == (1, parts[1].num_samples)
    assert sum(cut.duration for cut in parts) == pytest.approx(parts[0].recording.duration)
    reasons = [reason for _, reason in rejected(experiment)]
    wanted = ("duplicate id", "no such file", "too long", "no text", "JSONDecodeError")
    assert len(reasons) == len(wanted)
    for part in wanted:
        assert any(part in reason for reason in reasons), (part, reasons)


@pytest.mark.parametrize("shar", [False, True])
def test_cuts(tmp_path: Path, shar: bool, make_json_lines: Callable[[Path, str], Path]) -> None:
    from lhotse import CutSet

    manifest = make_json_lines(tmp_path / "nemo", "nl")
    first = run_stages(tmp_path / "first", "nl", {"kind": "jsonl", "train": [str(manifest)]})
    given = first.manifests_dir / "c_train.jsonl.gz"
    if shar:
        given = tmp_path / "shar"
        given.mkdir()
        cuts = CutSet.from_jsonl_lazy(first.manifests_dir / "c_train.jsonl.gz")
        cuts.to_shar(given, fields={"recording": "flac"}, shard_size=3)
    experiment = run_stages(tmp_path, "nl", {"kind": "cuts", "train": [str(given)]})
    assert texts(experiment) == texts(first)
    for new, old in zip(
        read_manifest(experiment.manifests_dir / "c_train_fbank.jsonl.gz"),
        read_manifest(first.manifests_dir / "c_train_fbank.jsonl.gz"),
        strict=True,
    ):
        assert new.supervisions[0].speaker == old.supervisions[0].speaker
        # FLAC has 16 bits: what is near silence differs more
        assert abs(new.load_features() - old.load_features()).mean() < 0.1


def test_cuts_of_two_channels_are_rejected(
    tmp_path: Path, make_json_lines: Callable[[Path, str], Path]
) -> None:
    from lhotse import CutSet

    manifest = make_json_lines(tmp_path / "nemo", "nl")
    first = run_stages(tmp_path / "first", "nl", {"kind": "jsonl", "train": [str(manifest)]})
    cuts = list(CutSet.from_jsonl_lazy(first.manifests_dir / "c_train.jsonl.gz"))
    joined = cuts[0].append(cuts[1])
    CutSet.from_cuts([joined, *cuts[2:]]).to_file(tmp_path / "mixed.jsonl.gz")
    corpus = Cuts(kind="cuts", train=(tmp_path / "mixed.jsonl.gz",)).model_dump(mode="json")
    experiment = run_stages(tmp_path, "nl", corpus)
    ((_, reason),) = rejected(experiment)
    assert reason == "not a cut of one channel of one recording"
    assert len(texts(experiment)["train"]) == len(cuts) - 2


@pytest.mark.parametrize(
    ("kind", "language", "reason"),
    [("mls", "ro", "none of them Romanian"), ("voxpopuli", "pt", "have no transcripts")],
)
def test_a_corpus_that_has_not_the_language_says_why(
    tmp_path: Path, kind: str, language: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=rf"(?s){reason}.*take it out of data\.corpora"):
        run_stages(tmp_path, language, {"kind": kind})


def test_the_table_knows_each_language_of_the_recipes() -> None:
    languages = {"de", "es", "fr", "it", "nl", "pl", "pt", "ro"}
    for kind, corpus in PUBLISHED.items():
        assert languages <= set(corpus.names) | set(corpus.absent), kind
        assert not set(corpus.names) & set(corpus.absent), kind
        assert all(name_of(kind, language) for language in corpus.names)
    assert name_of("fleurs", "cy") == "cy_gb"
    assert name_of("common_voice", "cy") == "cy"


def test_a_table_without_a_needed_column_says_which_it_has(tmp_path: Path) -> None:
    root = tmp_path / "cv/nl"
    (root / "clips").mkdir(parents=True)
    for split in SPLITS:
        (root / f"{split}.tsv").write_text("client_id\tfile\tsentence\n")
    with pytest.raises(ValueError, match=r"test\.tsv: no column path; it has client_id, file"):
        run_stages(tmp_path, "nl", {"kind": "common_voice", "path": str(tmp_path / "cv")})
