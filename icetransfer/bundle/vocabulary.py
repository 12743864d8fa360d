"""bpe.vocab of a bundle: scores with which sherpa-onnx cuts words into the model's own tokens.

BPE joins pieces in the order in which it learned them.  sherpa-onnx's encoder of hotwords takes
the pieces with the highest sum of scores instead, and with sentencepiece's scores, which are the
ranks of the joins, that is often another cut: at 500 tokens in a third of the words.  The model
never writes a word so, and the hotword would earn nothing.  Here the scores are learned from words
whose right cut is known, by a structured perceptron (Collins, 2002), from the pieces' frequencies.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from icetransfer.data.tokenizer import WORD_MARK, Tokenizer

_PASSES = 20
_STEP = 0.1
_MOST_WORDS = 5_000  # the most frequent ones


def best_cut(word: str, scores: Mapping[str, float], longest: int) -> list[str]:
    """The pieces of a word with the highest sum of scores, as sherpa-onnx finds them.

    Args:
        word: that the pieces can spell.
        scores: of each piece.
        longest: characters that a piece has at most.
    """
    text = WORD_MARK + word
    best = [(0.0, len(text))] * (len(text) + 1)  # from each place on: its sum, the next piece's end
    for begin in range(len(text) - 1, -1, -1):
        ends = range(begin + 1, min(len(text), begin + longest) + 1)
        found = [(scores[text[begin:end]] + best[end][0], -end) for end in ends
                 if text[begin:end] in scores]  # fmt: skip
        total, end = max(found, default=(-math.inf, -begin - 1))
        best[begin] = (total, -end)
    pieces, begin = [], 0
    while begin < len(text):
        end = best[begin][1]
        pieces.append(text[begin:end])
        begin = end
    return pieces


def learn_scores(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, float]:
    """Scores of all tokens with which `best_cut` gives what the tokenizer does.

    Args:
        tokenizer: of BPE.
        texts: normalised, in whose words the cuts are to agree.
    """
    names = tokenizer.tokens
    frequent = Counter(word for text in texts for word in text.split()).most_common(_MOST_WORDS)
    cuts = {word: [names[i] for i in tokenizer.encode(word)] for word, _ in frequent}
    counts = Counter(piece for word, count in frequent for piece in cuts[word] * count)
    total = sum(counts.values()) + 1
    scores = {name: math.log((counts[name] + 0.1) / total) for name in names}
    spelt = {word: cut for word, cut in cuts.items() if "".join(cut) == WORD_MARK + word}
    longest = max(map(len, names))
    for _ in range(_PASSES):
        if not sum(_correct(scores, word, cut, longest) for word, cut in spelt.items()):
            break
    return scores


def _correct(scores: dict[str, float], word: str, right: Sequence[str], longest: int) -> bool:
    """Moves scores towards the right cut; whether it was another."""
    found = best_cut(word, scores, longest)
    if found == right:
        return False
    for pieces, step in ((right, _STEP), (found, -_STEP)):
        for piece in pieces:
            scores[piece] += step
    return True


def vocabulary(tokenizer: Tokenizer, texts: Iterable[str]) -> str:
    """What stands in bpe.vocab: a token and its score a line, parted by a tab."""
    scores = learn_scores(tokenizer, texts)
    return "".join(f"{token}\t{scores[token]:.3f}\n" for token in tokenizer.tokens)
