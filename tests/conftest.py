"""Shared fixtures: where the reference numbers and the real speech lie, when they are there, and
small copies of published corpora, in their publishers' layout, of synthesised speech.
"""

import functools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch

from icetransfer.data.synthetic.espeak import Espeak
from icetransfer.experiment import log

# Kernels are decided on when they are imported: interpreted, where no GPU runs them.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

REPO = Path(__file__).resolve().parent.parent
SHARED = REPO.parent / "shared"

#: Five sentences a language: train, train, train, dev, test.
SENTENCES = {
    "de": ("Guten Morgen, wie geht es?", "Am 3. Mai fahren wir los.", "Das kostet 5 Euro.",
           "Die Sonne scheint heute.", "Um 14:30 Uhr ist Schluss."),
    "nl": ("Goedemorgen, hoe gaat het?", "Op 3 mei gaan we weg.", "Dat kost 5 euro.",
           "De zon schijnt vandaag.", "Om 14:30 uur is het klaar."),
    "pl": ("Dzień dobry, jak się masz?", "Zaczynamy 3 maja.", "To kosztuje 5 złotych.",
           "Dziś świeci słońce.", "Kończymy o 14:30."),
    "ro": ("Bună ziua, ce mai faci?", "Plecăm pe 3 mai.", "Asta costă 5 lei.",
           "Astăzi este soare.", "Terminăm la 14:30."),
}  # fmt: skip
PLACES = ("train", "train", "train", "dev", "test")

Speak = Callable[[str, str], np.ndarray]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """One thread: the same sums in the same order on every machine with the same kernels."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def log_as_it_was() -> Iterator[None]:
    """A command's main sets the log up for the terminal: the next test must not notice."""
    handlers, propagate = list(log.handlers), log.propagate
    yield
    log.handlers[:], log.propagate = handlers, propagate


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder of golden numbers made with icefall and k2; skips where it is absent."""
    folder = SHARED / "golden" / "tiny"
    if not folder.is_dir():
        pytest.skip(f"golden numbers not found at {folder}: only the copies in tests/ are checked")
    return folder


@pytest.fixture(scope="session")
def speech_dir() -> Path:
    """The folder of real human speech; skips where it is absent."""
    folder = SHARED / "speech"
    if not folder.is_dir():
        pytest.skip(f"real speech not found at {folder}: this test needs it")
    return folder


def _say(language: str, sentence: str) -> np.ndarray:
    voice = Espeak(language, "f2")
    said = voice.say(sentence, rate=170, pitch=50, pitch_range=50, seed=1)
    return soxr.resample(said.astype(np.float32) / 2**15, voice.sample_rate, 16_000)


@pytest.fixture(scope="session")
def speak() -> Iterator[Speak]:
    """Speech of a sentence in a language: float32, 16 kHz."""
    # Each in a process of its own, as espeak-ng wants it; this one stays without.
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        yield functools.cache(lambda *arguments: pool.apply(_say, arguments))


def write(path: Path, samples: np.ndarray, rate: int = 16_000) -> None:
    """Writes audio in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {".mp3": ("MP3", None), ".opus": ("OGG", "OPUS"), ".ogg": ("OGG", "VORBIS")}
    form, subtype = kind.get(path.suffix, (None, None))
    soundfile.write(path, soxr.resample(samples, 16_000, rate), rate, subtype, format=form)


def rows_by_split(rows: list[list[str]]) -> dict[str, list[list[str]]]:
    """Rows of (sentence's place, ...) under their splits."""
    return {
        split: [row for row, place in zip(rows, PLACES, strict=True) if place == split]
        for split in ("train", "dev", "test")
    }


@pytest.fixture
def make_common_voice(speak: Speak) -> Callable[[Path, str], Path]:
    """A release of Common Voice with every mistake: two training clips are sound."""
    columns = (
        "client_id", "path", "sentence_id", "sentence", "sentence_domain", "up_votes", "down_votes",
        "age", "gender", "accents", "variant", "locale", "segment", "a_column_of_tomorrow",
    )  # fmt: skip

    def line(number: int, language: str, sentence: str, speaker: str) -> list[str]:
        name = f"common_voice_{language}_{number}.mp3"
        cells = [speaker, name, f"s{number}", sentence, "", "2", "0", "", "", "", "", language, ""]
        return [*cells, "x"]

    def make(root: Path, language: str) -> Path:
        release = root / "cv-corpus-99.0-2026-09-01" / language
        clips = release / "clips"
        rows = []
        for number, sentence in enumerate(SENTENCES[language]):
            # one quotation mark, not closed: a reader that knows quoting would swallow lines
            rows.append(line(number, language, f'"{sentence}', f"speaker-{number}"))
            write(clips / rows[-1][1], speak(language, sentence), 32_000)
        tables = rows_by_split(rows)
        whole = (clips / rows[2][1]).read_bytes()
        (clips / rows[2][1]).write_bytes(whole[: len(whole) // 2])  # a truncated mp3
        missing = line(70, language, "x", "speaker-0")
        empty = line(71, language, "  ", "speaker-0")
        foreign = line(72, language, "東京", "speaker-0")
        for row in (empty, foreign):
            write(clips / row[1], speak(language, SENTENCES[language][0]), 32_000)
        short_row = ["speaker-0", "common_voice_x.mp3", "s"]
        tables["train"] += [rows[0], missing, empty, foreign, short_row]  # the first: a duplicate
        tables["validated"] = [*rows, line(80, language, SENTENCES[language][0], "speaker-4")]
        write(clips / tables["validated"][-1][1], speak(language, SENTENCES[language][0]), 32_000)
        for name, cells in tables.items():
            text = "".join("\t".join(row) + "\n" for row in [list(columns), *cells])
            (release / f"{name}.tsv").write_text(text, encoding="utf-8")
        return root

    return make


@pytest.fixture
def make_mls(speak: Speak) -> Callable[[Path, str, str, str], Path]:
    """A language of Multilingual LibriSpeech; MLS has neither digits nor punctuation."""

    def make(root: Path, language: str, name: str, codec: str) -> Path:
        folder = root / (f"mls_{name}" + ("_opus" if codec == "opus" else ""))
        rows = []
        for number, sentence in enumerate(SENTENCES[language]):
            identity = f"10{number}_20{number}_00000{number}"
            words = sentence.lower().translate({ord(c): "" for c in ",.?:0123456789"})
            rows.append([identity, " ".join(words.split())])
        for split, cells in rows_by_split(rows).items():
            for identity, text in cells:
                speaker, book, _ = identity.split("_")
                path = folder / split / "audio" / speaker / book / f"{identity}.{codec}"
                write(path, speak(language, text))
            extra = [cells[0], ["109_9_000001", "x"], ["108_8_000001", ""], ["no text"]]
            lines = "".join("\t".join(row) + "\n" for row in [*cells, *extra])
            (folder / split / "transcripts.txt").write_text(lines, encoding="utf-8")
        return root

    return make


@pytest.fixture
def make_fleurs(speak: Speak) -> Callable[[Path, str, str], Path]:
    """A language of FLEURS: tables without header, wav."""

    def make(root: Path, language: str, locale: str) -> Path:
        folder = root / locale
        rows = []
        for number, sentence in enumerate(SENTENCES[language]):
            samples = speak(language, sentence)
            plain = sentence.lower().strip(".?")
            letters = " ".join("|".join(plain.split()))
            cells = [str(number), f"{1000 + number}.wav", sentence, plain, letters]
            rows.append([*cells, str(len(samples)), "FEMALE"])
        for split, cells in rows_by_split(rows).items():
            for row in cells:
                write(folder / "audio" / split / row[1], speak(language, row[2]))
            lost = ["9", "9999.wav", "x", "x", "x", "16000", "MALE"]
            table = [*cells, lost, cells[0]]
            lines = "".join("\t".join(row) + "\n" for row in table)
            (folder / f"{split}.tsv").write_text(lines, encoding="utf-8")
        return root

    return make


@pytest.fixture
def make_voxpopuli(speak: Speak) -> Callable[[Path, str, str], Path]:
    """A language of VoxPopuli: its tools' layout (ogg by year) or that of its copy (wav)."""
    columns = ["id", "raw_text", "normalized_text", "speaker_id", "split", "gender", "is_gold"]

    def make(root: Path, language: str, suffix: str) -> Path:
        folder = root / language
        rows = []
        for number, sentence in enumerate(SENTENCES[language]):
            identity = f"2013100{number}-0900-PLENARY-1-{language}_2013100{number}"
            speaker = "None" if number == 0 else str(number)
            normalised = "" if number == 1 else sentence.lower()
            rows.append([identity, sentence, normalised, speaker, PLACES[number], "female", "True"])
        for split, cells in rows_by_split(rows).items():
            for row in cells:
                part = f"{split}/{split}_part_0" if suffix == "wav" else row[0][:4]
                write(folder / part / f"{row[0]}.{suffix}", speak(language, row[1]))
            lost = ["20140101-lost", "x", "x", "1", split, "male", "True"]
            silent = ["20140101-silent", "", "", "1", split, "male", "True"]
            table = [columns, *cells, lost, silent, cells[0]]
            lines = "".join("\t".join(row) + "\n" for row in table)
            (folder / f"asr_{split}.tsv").write_text(lines, encoding="utf-8")
        return root

    return make


@pytest.fixture
def make_json_lines(speak: Speak) -> Callable[[Path, str], Path]:
    """A NeMo manifest: whole files, and parts of a longer one."""

    def make(root: Path, language: str) -> Path:
        spoken = [speak(language, sentence) for sentence in SENTENCES[language]]
        rows: list[dict[str, object] | str] = []
        for number, samples in enumerate(spoken[:2]):
            write(root / f"audio/{number}.ogg", samples)
            path, seconds = f"audio/{number}.ogg", len(samples) / 16_000
            rows.append(
                {"audio_filepath": path, "duration": seconds, "text": SENTENCES[language][number]}
            )
        write(root / "audio/long.flac", np.concatenate(spoken))
        offset = 0.0
        for number, samples in enumerate(spoken):
            seconds = len(samples) / 16_000
            rows.append({
                "audio_filepath": str(root / "audio/long.flac"), "offset": offset,
                "duration": seconds, "text": SENTENCES[language][number], "speaker": "anna",
                "lang": language,
            })  # fmt: skip
            offset += seconds
        rows += [
            {"audio_filepath": "audio/lost.wav", "duration": 1.0, "text": "x"},
            {"audio_filepath": "audio/0.ogg", "duration": 60.0, "text": "x", "offset": 0.5},
            {"audio_filepath": "audio/1.ogg", "duration": 1.0},
            '{"audio_filepath": ',
        ]
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        (root / "manifest.json").write_text("\n".join(lines) + "\n")
        return root / "manifest.json"

    return make
