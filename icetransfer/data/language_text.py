"""The text that language models are trained on -> exp/language_model/text.txt, text.json.

It is the transcripts of the experiment's own hours and, where `language_model.text` says so, the
user's `data.text`: files or folders of plain or gzipped text, a sentence a line or prose.  Each
sentence goes through the text rules that transcripts go through; what the rules doubt, and what has
letters that the language does not have, is left out.  Each stands there once, and none that is in a
dev or test split of the recipe.  text.json counts all of it, file by file.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from icetransfer.data.jsonl import read_jsonl_gz
from icetransfer.data.subset import subset_path, training_texts
from icetransfer.data.text.normalizer import Normalizer
from icetransfer.data.text.sentences import sentences
from icetransfer.experiment import Experiment, log
from icetransfer.stage import atomic
from icetransfer.stage.progress import progress_bar
from icetransfer.stage.stamp import Stamp, digests, known_sha256

TRANSCRIPTS = "transcripts"
MOST_WORDS = 100  # more in a sentence, and it is a list or a text whose sentences were not found
FOREIGN = 0.5  # of a file's sentences with foreign letters: it is of another language
_SUFFIXES = (".txt", ".text", ".gz")


@dataclass
class Counts:
    """What became of the sentences of a file."""

    sentences: int = 0
    kept: int = 0
    words: int = 0  # of those that were kept
    empty: int = 0  # without a word
    foreign: int = 0  # with letters that the language does not have
    doubtful: int = 0  # which can be read in two ways
    too_long: int = 0
    repeated: int = 0
    held_out: int = 0  # in a dev or test split


def text_path(experiment: Experiment) -> Path:
    """Where the sentences are, one a line."""
    return experiment.language_model_dir / "text.txt"


def text_files(paths: Iterable[Path]) -> list[Path]:
    """The files that `data.text` names, those of folders sorted.

    Raises:
        ValueError: one does not exist, or a folder holds no text.
    """
    found = []
    for path in paths:
        if path.is_file():
            found.append(path)
        elif path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES and p.is_file())
            if not inside:
                raise ValueError(
                    f"data.text: {path} holds no file that ends in {', '.join(_SUFFIXES)}"
                )
            found += inside
        else:
            raise ValueError(f"data.text: {path} does not exist; name files or folders of text")
    return found


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a plain or gzipped file, without their ends.

    Raises:
        ValueError: a line is not UTF-8, or the file is no whole gzip file.
    """
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError:
        raise ValueError(f"data.text: {path}:{number} is not UTF-8: save it as UTF-8") from None
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"data.text: {path} is not a whole gzip file: {error}") from None


def held_out_sentences(experiment: Experiment) -> set[bytes]:
    """What identifies the sentences of every dev and test split."""
    found = set()
    for corpus in experiment.config.data.corpora:
        for split in ("dev", "test"):
            for cut in read_jsonl_gz(experiment.manifests_dir / f"{corpus}_{split}.jsonl.gz"):
                for supervision in cut["supervisions"]:
                    found.add(_identity(supervision.get("text") or ""))
    return found


def _identity(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:8]


class Collector:
    """Takes sentences and gives those that are to be trained on.

    Args:
        normalizer: of the language.
        held_out: what identifies the sentences that may not be.
    """

    def __init__(self, normalizer: Normalizer, held_out: set[bytes]) -> None:
        self._normalizer, self._held_out = normalizer, held_out
        self._seen: set[bytes] = set()

    def transcripts(self, texts: Iterable[str], counts: Counts) -> Iterator[str]:
        """Those of normalised transcripts."""
        for text in texts:
            counts.sentences += 1
            yield from self._once(text, counts)

    def file(self, path: Path, counts: Counts) -> Iterator[str]:
        """Those of a file of the user's.

        Raises:
            ValueError: it cannot be read, holds no sentence, or is of another language.
        """
        first_foreign = ""
        for line in sentences(read_lines(path), self._normalizer.abbreviations):
            counts.sentences += 1
            reading = self._normalizer.read(line.text)
            if foreign := self._normalizer.outside(reading.text):
                counts.foreign += 1
                letters = "".join(foreign[:10])
                first_foreign = first_foreign or f"line {line.number} has {letters!r}"
            elif reading.doubts:
                counts.doubtful += 1
            else:
                yield from self._once(reading.text, counts)
        if not counts.sentences:
            raise ValueError(f"data.text: {path} holds no text")
        if counts.foreign > FOREIGN * counts.sentences:
            raise ValueError(
                f"data.text: {path}: {counts.foreign} of {counts.sentences} sentences have letters "
                f"that {self._normalizer.name} does not have ({first_foreign}): is it text of "
                f"another language?"
            )

    def _once(self, text: str, counts: Counts) -> Iterator[str]:
        words, identity = len(text.split()), _identity(text)
        if not words:
            counts.empty += 1
        elif words > MOST_WORDS:
            counts.too_long += 1
        elif identity in self._held_out:
            counts.held_out += 1
        elif identity in self._seen:
            counts.repeated += 1
        else:
            self._seen.add(identity)
            counts.kept += 1
            counts.words += words
            yield text


def collect_text(experiment: Experiment) -> Path:
    """Writes the sentences to train on, unless they are there and still right; where they are.

    Raises:
        ValueError: a file is missing, is not text, or is of another language; nothing is left.
    """
    config, target = experiment.config, text_path(experiment)
    counts_path = target.with_suffix(".json")
    use_text = config.language_model.text == "text"
    files = text_files(config.data.text) if use_text else []
    if use_text and not files:
        raise ValueError("language_model.text=text needs data.text=[FILE or folder, ...]")
    normalizer = Normalizer(config.language)
    splits = [f"{c}_{s}.jsonl.gz" for c in config.data.corpora for s in ("train", "dev", "test")]
    inputs = digests([subset_path(experiment), *(experiment.manifests_dir / s for s in splits)])
    inputs |= {str(path): known_sha256(path) for path in files}
    stamp = Stamp(target.with_suffix(".stamp.json"), inputs | {"rules": normalizer.version})
    if stamp.is_current(target, counts_path):
        log.info("skip: %s is complete", target)
        return target
    stamp.renew(target, counts_path)
    collector = Collector(normalizer, held_out_sentences(experiment))
    found: dict[str, Counts] = {TRANSCRIPTS: Counts()}
    with atomic.atomic_path(target) as temporary, temporary.open("w", encoding="utf-8") as lines:
        for text in collector.transcripts(training_texts(experiment), found[TRANSCRIPTS]):
            lines.write(text + "\n")
        with progress_bar() as progress:
            bar = progress.add_task("text", total=sum(path.stat().st_size for path in files))
            for path in files:
                counts = found[str(path)] = Counts()
                for text in collector.file(path, counts):
                    lines.write(text + "\n")
                progress.update(bar, advance=path.stat().st_size)
        if not any(counts.kept for counts in found.values()):
            raise ValueError("no text to train a language model on: every sentence was left out")
    for name, counts in found.items():
        log.info("%s: %s", name, ", ".join(f"{k} {v}" for k, v in asdict(counts).items() if v))
    tree = {name: asdict(counts) for name, counts in found.items()}
    atomic.write_text(counts_path, json.dumps(tree, indent=1, ensure_ascii=False) + "\n")
    return target
