"""A made-up reading of a text: what a CTC head would put out, with errors, at known times."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from icetransfer.data.long.heard import OUTPUT_FRAMES, Heard, find_peaks
from icetransfer.data.text.normalizer import Normalizer
from icetransfer.data.tokenizer import Tokenizer, train_tokenizer

NOUNS = [
    "hond",
    "kat",
    "boom",
    "fiets",
    "boot",
    "brug",
    "markt",
    "school",
    "trein",
    "appel",
    "tafel",
    "stoel",
    "dokter",
    "bakker",
]
VERBS = [
    "ziet",
    "hoort",
    "vindt",
    "koopt",
    "verkoopt",
    "zoekt",
    "bewaart",
    "vergeet",
    "schildert",
    "draagt",
    "volgt",
]
PLACES = [
    "thuis",
    "buiten",
    "vandaag",
    "morgen",
    "soms",
    "nooit",
    "altijd",
    "ergens",
    "boven",
    "beneden",
    "zaterdag",
]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
NORMALIZER = Normalizer("nl")


def sentences(count: int, seed: int = 0) -> list[str]:
    """Sentences that are all different, with capitals and full stops."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        one, other = rng.sample(NOUNS, 2)
        words = f"De {one} {rng.choice(VERBS)} {rng.choice(PLACES)} een {other}"
        found[
            f"{words} {rng.choice(['en', 'of'])} {rng.choice(PLACES)} de {rng.choice(NOUNS)}."
        ] = None
    return list(found)


def make_tokenizer() -> Tokenizer:
    """About one token a letter, as the mini preset's."""
    text = [NORMALIZER(sentence) for sentence in sentences(40)] + [" ".join(LETTERS)]
    return Tokenizer(train_tokenizer(text, 45))


class Reading:
    """A reading that is made part by part; `heard` is what a model hears of it."""

    def __init__(self, tokenizer: Tokenizer, seed: int = 0, errors: float = 0.1) -> None:
        self._tokenizer, self._errors = tokenizer, errors
        self._rng = np.random.default_rng(seed)
        self._rows: list[np.ndarray] = []
        self._loud: list[float] = []
        self.times: list[tuple[float, float]] = []  # of each part that was said, in seconds

    def _frame(self, token: int, probability: float) -> None:
        row = self._rng.random(self._tokenizer.vocab_size) ** 4
        row *= (1 - probability) / (row.sum() - row[token])
        row[token] = probability
        self._rows.append(np.log(row))

    def pause(self, seconds: float) -> None:
        """Says nothing."""
        for _ in range(round(seconds / 0.04)):
            self._frame(0, 0.97)
            self._loud += [0.0] * OUTPUT_FRAMES

    def say(self, text: str, pause: float = 0.48) -> None:
        """Says a sentence, and then nothing for some time."""
        begin = len(self._rows)
        for token in self._tokenizer.encode(NORMALIZER(text)):
            if self._rng.random() < self._errors:
                self._frame(int(self._rng.integers(3, self._tokenizer.vocab_size)), 0.6)
            else:
                self._frame(token, 0.5 + 0.45 * self._rng.random())
            self._frame(0, 0.9)
            self._loud += [8.0] * (2 * OUTPUT_FRAMES)
        self.times.append((0.04 * begin, 0.04 * len(self._rows)))
        self.pause(pause)

    @property
    def heard(self) -> Heard:
        """What the model hears."""
        log_probs = np.array(self._rows, dtype=np.float32)
        energy = np.array(self._loud, dtype=np.float32)
        energy += self._rng.normal(0, 0.2, len(energy)).astype(np.float32)
        return Heard(log_probs, energy, find_peaks(log_probs.argmax(axis=1)))


def read(tokenizer: Tokenizer, said: Sequence[str], seed: int = 0, errors: float = 0.1) -> Reading:
    """A reading of some sentences."""
    reading = Reading(tokenizer, seed, errors)
    reading.pause(0.4)
    for sentence in said:
        reading.say(sentence)
    return reading
