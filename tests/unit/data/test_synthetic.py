"""The synthetic corpus: the same bytes, disjoint splits, enough words, sound audio."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from icetransfer.data.synthetic import espeak, speech
from icetransfer.data.synthetic.sentences import (
    DOMAINS,
    SentenceSource,
    read_grammar,
    split_of,
    synthetic_languages,
)
from icetransfer.data.text.normalizer import Normalizer

MINUTES = {"train": 0.45, "dev": 0.05, "test": 0.05}
# 45 minutes at the 4.3 s (open) and 3.4 s (slots) that an utterance lasts, a cautious count.
SENTENCES_IN_45_MINUTES = {"open": 605, "slots": 750}


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith("_recordings.jsonl.gz")  # hold the folder
    }


def manifest(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    speech.synthesise("nl", "slots", MINUTES, folder, seed=3, jobs=2)
    return folder


@pytest.mark.parametrize(
    ("language", "domain"),
    [
        (language, domain)
        for language in synthetic_languages()
        for domain in DOMAINS
        if domain in read_grammar(language)
    ],
)
def test_words_and_splits(language: str, domain: str) -> None:
    count = SENTENCES_IN_45_MINUTES[domain]
    drawn = speech.draw_sentences(language, domain, {"train": count, "dev": 60, "test": 60}, seed=0)
    normalizer = Normalizer(language)
    texts = {split: [sentence.text for sentence in part] for split, part in drawn.items()}
    for split, part in texts.items():
        assert len(set(part)) == len(part)
        for text in part:
            assert split_of(text) == split
            assert normalizer(text) == text
            assert normalizer.check(text) == []
    words = {word for text in texts["train"] for word in text.split()}
    if domain == "open":
        # The base models' languages have fewer lists of words.
        assert len(words) >= (1500 if "slots" in read_grammar(language) else 1000)
    else:
        assert len(words) >= 200
        everywhere = {word for part in texts.values() for text in part for word in text.split()}
        assert len(everywhere) <= 400
        assert len(everywhere - words) <= 0.04 * len(words), "the domain is not closed"


def test_sentences_depend_on_the_seed_alone() -> None:
    def some(seed: int, count: int) -> list[str]:
        source = SentenceSource("it", "slots").sentences("train", seed)
        return [next(source).text for _ in range(count)]

    assert some(1, 20) == some(1, 40)[:20]
    assert some(1, 20) != some(2, 20)


def test_unknown_requests_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'cy'; known: ca, cs, da"):
        speech.synthesise("cy", "slots", MINUTES, tmp_path)
    with pytest.raises(ValueError, match="'closed'; expected one of slots, open"):
        speech.synthesise("nl", "closed", MINUTES, tmp_path)
    with pytest.raises(ValueError, match=r"no slots sentences for language 'ca'; .* has open"):
        speech.synthesise("ca", "slots", MINUTES, tmp_path)
    with pytest.raises(ValueError, match="'valid'; expected train, dev, test"):
        speech.synthesise("nl", "slots", {"valid": 1.0}, tmp_path)


def test_corpus_is_what_was_asked_for(corpus: Path) -> None:
    seen: dict[str, set[str]] = {"text": set(), "speaker": set()}
    for split, minutes in MINUTES.items():
        recordings = manifest(corpus / f"{split}_recordings.jsonl.gz")
        supervisions = manifest(corpus / f"{split}_supervisions.jsonl.gz")
        seconds = sum(recording["duration"] for recording in recordings)
        assert 60 * minutes <= seconds < 60 * minutes + 8
        assert [s["recording_id"] for s in supervisions] == [r["id"] for r in recordings]
        for recording, supervision in zip(recordings, supervisions, strict=True):
            samples, rate = soundfile.read(recording["sources"][0]["source"])
            assert rate == 16000
            assert samples.shape == (recording["num_samples"],)
            assert 1.0 < recording["duration"] < 10.0
            assert 0.005 < np.sqrt(np.mean(samples**2)) < 0.3
            assert np.abs(samples).max() < 1.0
            assert supervision["text"] == Normalizer("nl")(supervision["custom"]["raw_text"])
        for key, values in seen.items():
            here = {supervision[key] for supervision in supervisions}
            assert not here & values
            values |= here


def test_lhotse_reads_it(corpus: Path) -> None:
    from lhotse import CutSet, load_manifest

    cuts = CutSet.from_manifests(
        recordings=load_manifest(corpus / "dev_recordings.jsonl.gz"),
        supervisions=load_manifest(corpus / "dev_supervisions.jsonl.gz"),
    )
    cut = next(iter(cuts))
    assert cut.load_audio().shape == (1, cut.num_samples)


def test_same_bytes_with_one_process(corpus: Path, tmp_path: Path) -> None:
    speech.synthesise("nl", "slots", MINUTES, tmp_path, seed=3, jobs=1)
    assert files_of(tmp_path) == files_of(corpus)


def test_another_seed_gives_another_corpus_and_is_refused_here(
    corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="different seed"):
        speech.synthesise("nl", "slots", MINUTES, corpus, seed=4)
    speech.synthesise("nl", "slots", {"dev": 0.05}, tmp_path, seed=4)
    first = manifest(tmp_path / "dev_supervisions.jsonl.gz")[0]
    assert first["text"] != manifest(corpus / "dev_supervisions.jsonl.gz")[0]["text"]


def test_longer_corpus_contains_the_shorter(corpus: Path, tmp_path: Path) -> None:
    speech.synthesise("nl", "slots", {"train": 0.2}, tmp_path, seed=3)
    small = manifest(tmp_path / "train_supervisions.jsonl.gz")
    large = manifest(corpus / "train_supervisions.jsonl.gz")
    assert 0 < len(small) < len(large)
    assert large[: len(small)] == small


def test_killed_run_continues(corpus: Path, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from icetransfer.data.synthetic.speech import synthesise;"
        f"synthesise('nl', 'slots', {MINUTES!r}, Path({str(tmp_path)!r}), seed=3, jobs=1)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], start_new_session=True, stdout=subprocess.DEVNULL
    )
    first = tmp_path / "audio/train/00000"
    while not first.exists() and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    made = first.stat().st_mtime_ns
    speech.synthesise("nl", "slots", MINUTES, tmp_path, seed=3, jobs=2)
    assert files_of(tmp_path) == files_of(corpus)
    assert first.stat().st_mtime_ns == made, "a finished chunk was made again"


def test_finished_corpus_is_left_alone(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files_of(corpus)
    monkeypatch.setattr(speech, "_make_chunk", None)
    speech.synthesise("nl", "slots", MINUTES, corpus, seed=3)
    assert files_of(corpus) == before


def _digests_of_voices(names: list[str], results: Any) -> None:
    """What each voice says; in a process of its own, which may use espeak-ng."""
    said: dict[str, bytes] = {}
    for name in names:
        voice = espeak.Espeak("nl", name)
        said[name] = voice.say("goedemorgen", rate=160, pitch=50, pitch_range=50, seed=1).tobytes()
    results.put({name: hash(samples) for name, samples in said.items()})


def test_every_voice_exists_and_differs() -> None:
    names = [name for split in speech.VOICES.values() for name in split]
    assert len(set(names)) == len(names)
    assert set(names) <= espeak.variants()
    context = get_context("fork")
    results = context.Queue()
    process = context.Process(target=_digests_of_voices, args=(names, results))
    process.start()
    digests: Mapping[str, int] = results.get(timeout=60)
    process.join()
    assert len(set(digests.values())) == len(names)


def test_unknown_variant_does_not_pass_silently() -> None:
    with pytest.raises(ValueError, match="no voice variant 'nosuch'; it has"):
        espeak.Espeak("nl", "nosuch")
    assert not espeak.is_loaded(), "this process must stay one that can synthesise"


def test_foreign_words_are_dropped() -> None:
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def ask() -> None:
        voice = espeak.Espeak("de")
        sender.send([voice.reads_as_foreign(word) for word in ("download", "fahrrad")])

    process = context.Process(target=ask)
    process.start()
    assert receiver.recv() == [True, False]
    process.join()
