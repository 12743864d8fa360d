"""Stage 4: sentencepiece tokens of the text of the hours to train on -> lang/bpe.model, tokens.txt.

Tokens are of the experiment's own hours, not of all the recipe has: whoever has two minutes of
speech has the text of two minutes.  Text of the user's (`data.tokenizer_text`) is added to it.
The first ids are icefall's and sherpa-onnx's convention: `<blk>` 0, `<sos/eos>` 1, `<unk>` 2.
"""

import io
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import sentencepiece

from icetransfer.data.subset import subset_path, training_texts
from icetransfer.data.text.characters import graphemes
from icetransfer.data.text.normalizer import Normalizer
from icetransfer.experiment import Experiment, log, run_stage, write_provenance
from icetransfer.stage import atomic
from icetransfer.stage.stamp import Stamp, digests, known_sha256

BLANK_ID = 0
UNK_ID = 2
SPECIAL_SYMBOLS = ("<blk>", "<sos/eos>")  # before <unk>
WORD_MARK = "▁"  # begins a word in sentencepiece's pieces


class Tokenizer:
    """Text to token ids and back."""

    def __init__(self, model: Path | bytes) -> None:
        """Reads a sentencepiece model whose first ids are `<blk>`, `<sos/eos>`, `<unk>`.

        Args:
            model: a `bpe.model` file, or its bytes.

        Raises:
            ValueError: the file is missing or is damaged, or its special ids are others.
        """
        where = "bytes"
        if isinstance(model, Path):
            if not model.is_file():
                raise ValueError(
                    f"{model} does not exist: stage 4 trains the tokenizer, stage 11 packs it"
                )
            where, model = str(model), model.read_bytes()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            size = self._processor.vocab_size()
        except RuntimeError as error:
            raise ValueError(
                f"{where} is not a sentencepiece model, or is damaged ({error}): bring back what "
                f"it was; before training, stage 4 makes it again"
            ) from None
        if size <= UNK_ID:
            raise ValueError(
                f"{where} has {size} tokens: expected at least {list(SPECIAL_SYMBOLS)}"
            )
        first = [self._processor.id_to_piece(i) for i in range(UNK_ID)]
        if tuple(first) != SPECIAL_SYMBOLS or self._processor.unk_id() != UNK_ID:
            raise ValueError(
                f"{where}: the first tokens are {first} and <unk> is {self._processor.unk_id()}; "
                f"expected {list(SPECIAL_SYMBOLS)} and {UNK_ID}"
            )

    @property
    def vocab_size(self) -> int:
        """The number of tokens, blank and the other special ones included."""
        return int(self._processor.vocab_size())

    @property
    def tokens(self) -> list[str]:
        """The pieces in the order of their ids."""
        return [self._processor.id_to_piece(i) for i in range(self.vocab_size)]

    def encode(self, text: str) -> list[int]:
        """Token ids of normalised text; a character outside the vocabulary becomes `<unk>`."""
        ids: list[int] = self._processor.encode(text, out_type=int)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of token ids; special symbols are left out, `<unk>` is written as `⁇`."""
        text: str = self._processor.decode([i for i in ids if i >= len(SPECIAL_SYMBOLS)])
        return re.sub(r"\s+", " ", text).strip()

    def units(self, text: str) -> list[str]:
        """What errors are counted in: words, or characters where these are the tokens."""
        return graphemes(text.replace(" ", "")) if self.is_of_characters else text.split()

    @cached_property
    def is_of_characters(self) -> bool:
        """Whether every token is a character, and the space is one of them."""
        return all(len(piece) == 1 for piece in self.tokens[UNK_ID + 1 :])

    @cached_property
    def space_id(self) -> int | None:
        """The token of the space, where characters are the tokens and it is one of them."""
        has_space = self.is_of_characters and WORD_MARK in self.tokens
        return self.tokens.index(WORD_MARK) if has_space else None

    def unknown_characters(self, text: str) -> str:
        """The characters of `text` that the vocabulary lacks, each once, in order."""
        if UNK_ID not in self.encode(text):
            return ""
        return "".join(
            character
            for character in dict.fromkeys(text)
            if not character.isspace() and UNK_ID in self.encode(character)
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int, kind: str = "bpe") -> bytes:
    """Trains a sentencepiece model; the same text gives the same bytes.

    No piece of BPE crosses a space, so it is trained on words with their counts, of which there are
    few in any number of sentences.

    Args:
        texts: normalised sentences.
        vocab_size: tokens wanted, special ones included.  When the text does not hold that many
            pieces, the largest possible number is taken and a warning says so.
        kind: "bpe", or "characters": each is a token, however many there are.

    Returns:
        The sentencepiece model.

    Raises:
        ValueError: there is no text, or `vocab_size` is below what its characters alone need.
    """
    whole = kind == "characters"  # the space is one of them
    counts = Counter(part for text in texts for part in ([text] if whole else text.split()))
    if not any(map(str.strip, counts)):
        raise ValueError("no text to train the tokenizer on: every training transcript is empty")
    if whole:
        return _train(counts, vocab_size, kind)
    characters = len(set().union(*counts))
    least = characters + len(SPECIAL_SYMBOLS) + 2  # <unk> and the word boundary
    if vocab_size < least:
        raise ValueError(
            f"data.vocab_size={vocab_size} is too small: the {characters} characters of the "
            f"training text and the special tokens need at least {least}"
        )
    try:
        return _train(counts, vocab_size)
    except RuntimeError as error:
        largest = re.search(r"value <= (\d+)", str(error))
        if largest is None:
            raise
    log.warning(
        "data.vocab_size=%d is more than the training text supports; using the most it does, %s",
        vocab_size,
        largest[1],
    )
    return _train(counts, int(largest[1]))


def _train(counts: Mapping[str, int], vocab_size: int, kind: str = "bpe") -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(f"{text}\t{count}" for text, count in counts.items()),
        input_format="tsv",
        model_writer=model,
        vocab_size=vocab_size,
        character_coverage=1.0,
        normalization_rule_name="identity",  # the text is normalised already
        user_defined_symbols=list(SPECIAL_SYMBOLS),
        unk_id=UNK_ID,
        bos_id=-1,
        eos_id=-1,
        num_threads=1,
        minloglevel=2,
        model_type="char" if kind == "characters" else "bpe",
        use_all_vocab=kind == "characters",
        add_dummy_prefix=kind == "bpe",
    )
    return model.getvalue()


def write_tokens(tokenizer: Tokenizer, path: Path) -> None:
    """Writes `tokens.txt`, one "token id" a line, as sherpa-onnx reads it."""
    lines = [f"{token} {i}" for i, token in enumerate(tokenizer.tokens)]
    atomic.write_text(path, "\n".join(lines) + "\n")


def given_texts(experiment: Experiment) -> Iterator[str]:
    """The lines of `data.tokenizer_text`, normalised as transcripts are.

    A line with letters that the language does not have is left out, as such a transcript is.

    Raises:
        ValueError: a file is missing, or not text in UTF-8.
    """
    for path in experiment.config.data.tokenizer_text:
        if not path.is_file():
            raise ValueError(
                f"data.tokenizer_text: {path} does not exist; name files of plain text"
            )
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"data.tokenizer_text: {path} is not text in UTF-8: {error}") from None
        normalizer = Normalizer(experiment.config.language)
        texts = [text for line in lines if (text := normalizer(line))]
        taken = [text for text in texts if not normalizer.check(text)]
        if not taken:
            raise ValueError(
                f"data.tokenizer_text: {path} has no line of {normalizer.name}: is it another file?"
            )
        left_out = len(texts) - len(taken)
        log.info("%s: %d lines, %d with foreign letters left out", path, len(taken), left_out)
        yield from taken


def make_tokenizer(experiment: Experiment) -> None:
    """Trains the tokenizer of the experiment's hours, unless it is there.

    Raises:
        ValueError: the subset or a file of text is missing or not text, or there is too little.
    """
    folder = experiment.recipe_lang_dir
    model_path, tokens_path = folder / "bpe.model", folder / "tokens.txt"
    subset = subset_path(experiment)
    data = experiment.config.data
    manifests = [experiment.manifests_dir / f"{name}_train.jsonl.gz" for name in data.corpora]
    inputs = digests([subset, *manifests]) | {"vocab_size": str(data.vocab_size)}
    inputs |= {"tokens": data.tokens} if data.tokens != "bpe" else {}
    if data.tokenizer_text:
        inputs |= {"text rules": Normalizer(experiment.config.language).checksum}
        inputs |= {str(path): known_sha256(path) for path in data.tokenizer_text}
    stamp = Stamp(folder / "stamp.json", inputs)
    if stamp.is_current(model_path, tokens_path):
        log.info("skip: %s is complete", folder)
        return
    stamp.renew(model_path, tokens_path)
    texts = itertools.chain(training_texts(experiment), given_texts(experiment))
    model = train_tokenizer(texts, data.vocab_size, data.tokens)
    with atomic.atomic_path(model_path) as temporary:
        temporary.write_bytes(model)
    tokenizer = Tokenizer(model)
    write_tokens(tokenizer, tokens_path)
    write_provenance(experiment, "tokenizer", vocab_size=tokenizer.vocab_size)
    log.info("%d tokens -> %s", tokenizer.vocab_size, tokens_path)


if __name__ == "__main__":
    run_stage(__doc__, make_tokenizer)
