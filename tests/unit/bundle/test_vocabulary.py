"""bpe.vocab: the cuts of sherpa-onnx's encoder are those of BPE."""

import random

import pytest

from icetransfer.bundle.vocabulary import best_cut, learn_scores, vocabulary
from icetransfer.data.tokenizer import Tokenizer, train_tokenizer


def made_up_words(count: int, seed: int) -> list[str]:
    """Words of syllables, the first of which are the most frequent."""
    rng = random.Random(seed)
    syllables = [
        a + b + c for a in "bdgklmnprstv" for b in ("a", "ee", "o") for c in ("", "n", "r")
    ]
    weights = [1 / (rank + 1) for rank in range(len(syllables))]
    return ["".join(rng.choices(syllables, weights, k=rng.randint(1, 4))) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(train_tokenizer(made_up_words(900, 1), 120))


def wrong(tokenizer, words, scores):
    names = tokenizer.tokens
    right = {word: [names[number] for number in tokenizer.encode(word)] for word in words}
    return sum(best_cut(word, scores, 20) != cut for word, cut in right.items()) / len(right)


def test_scores_are_learned_from_words_and_hold_for_others(tokenizer) -> None:
    words = set(made_up_words(900, 1))
    others = set(made_up_words(900, 2)) - words
    ranks = {name: -float(rank) for rank, name in enumerate(tokenizer.tokens)}
    scores = learn_scores(tokenizer, made_up_words(900, 1))
    assert wrong(tokenizer, words, ranks) > 0.1
    assert wrong(tokenizer, words, scores) < 0.01
    assert wrong(tokenizer, others, scores) < 0.3 * wrong(tokenizer, others, ranks)


def test_ties_and_whole_words() -> None:
    scores = {"▁": -1.0, "a": -1.0, "▁a": -2.0, "b": -5.0}
    assert best_cut("a", scores, 4) == ["▁", "a"]  # of equal sums, the shorter first piece
    assert best_cut("ab", scores | {"▁ab": -1.5}, 4) == ["▁ab"]


def test_the_file_has_every_token_in_its_place(tokenizer) -> None:
    lines = vocabulary(tokenizer, ["bana", ""]).splitlines()
    assert [line.split("\t")[0] for line in lines] == tokenizer.tokens
    assert all(float(line.split("\t")[1]) > -99 for line in lines)
