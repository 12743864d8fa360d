"""How well long recordings are cut: sentences of a corpus, put together, cut, and compared.

    python benchmarks/bench_long_recordings.py --exp EXP --corpus DIR [--minutes 10] [--limit N]
    python benchmarks/bench_long_recordings.py --exp EXP --corpus DIR --write OUT [--minutes 60]

DIR is a folder of short recordings with a transcripts.tsv, which the model should not have learned
from.  They are put together in their order, with pauses of 0.3 to 1.2 s of faint noise, to
recordings of --minutes.  Where a sentence begins and ends is known; where words inside it do, a
forced alignment of it alone says, whose text is known to be right.

The text is changed in four ways: not at all; one sentence in ten is missing; one in ten is added
that nobody says; all of it is that of another recording.  For thresholds of confidence:

  words       share of the words that were said and stand in the text, that is kept
  right       share of the utterances that hold exactly the words that are said in them
  wrong       share of the kept words that are not said where the utterance is
  in 0, 0.2, 0.5  share of the ends of utterances, where a sentence begins or ends, that lie in the
              pause there, or how many seconds from it

--write makes OUT/NNN.flac and .txt alone, to time `python -m icetransfer.long_recordings` on them.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import kaldialign
import numpy as np
import soundfile
from rich.console import Console
from rich.table import Table

from icetransfer.data.features import fbank
from icetransfer.data.long.cutting import Cutter, Limits, Piece
from icetransfer.data.long.heard import OUTPUT_SECONDS, Heard
from icetransfer.data.long.pauses import quiet_frames
from icetransfer.data.long.words import read_long_text
from icetransfer.data.readers.folder import read_folder
from icetransfer.data.text.normalizer import Normalizer
from icetransfer.data.utterances import SAMPLING_RATE, Utterance
from icetransfer.long_recordings import Aligner, align, make_aligner, without_chance
from icetransfer.streaming import alignment, audio
from icetransfer.streaming.posteriors import hear

THRESHOLDS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
CHANGED = 0.1  # of the sentences


@dataclass(frozen=True)
class Said:
    """A sentence in a long recording.

    Attributes:
        text: of it.
        start: seconds at which its first sound begins.
        end: seconds at which its last ends.
        words: when each word is said.
    """

    text: str
    start: float
    end: float
    words: list[tuple[float, float]]


@dataclass(frozen=True)
class Long:
    """A long recording: its samples, and what is said in it."""

    samples: np.ndarray
    said: list[Said]


def join(rows: Sequence[Utterance], aligner: Aligner | None, seed: int) -> Long:
    """Puts recordings together."""
    rng = np.random.default_rng(seed)
    parts: list[np.ndarray] = []
    said, position = [], 0
    for row in rows:
        gap = rng.normal(0, 0.0005, round(rng.uniform(0.3, 1.2) * SAMPLING_RATE))
        clip = np.concatenate([*audio.read_file(str(row.path))])
        parts += [gap.astype(np.float32), clip]
        begin = (position + len(gap)) / SAMPLING_RATE
        position += len(gap) + len(clip)
        if aligner is None:
            said.append(Said(row.text, begin, begin, []))
            continue
        loud = np.flatnonzero(~quiet_frames(np.logaddexp.reduce(fbank(clip), axis=1)))
        said.append(
            Said(
                row.text, begin + 0.01 * loud[0], begin + 0.01 * (loud[-1] + 1),
                [(begin + a, begin + b) for a, b in _word_times(aligner, clip, row.text)],
            )
        )  # fmt: skip
    return Long(np.concatenate(parts), said)


def _word_times(aligner: Aligner, clip: np.ndarray, text: str) -> list[tuple[float, float]]:
    words = aligner.normalizer(text).split()
    return alignment.align(aligner.model, clip, [aligner.tokenizer.encode(w) for w in words])


def groups(corpus: Path, minutes: float, limit: int | None) -> Iterator[list[Utterance]]:
    """The recordings of a corpus, for long ones of so many minutes."""
    rows = [row for row in read_folder(corpus, 0) if isinstance(row, Utterance)][:limit]
    group: list[Utterance] = []
    seconds = 0.0
    for row in rows:
        group.append(row)
        seconds += soundfile.info(row.path).duration + 0.75
        if seconds >= 60 * minutes:
            yield group
            group, seconds = [], 0.0
    if group:
        yield group


#: A sentence of a text: which one of the recording it is, or None of one that is not said.
Line = tuple[int | None, str]


def changed(long: Long, others: Sequence[str], seed: int) -> dict[str, list[Line]]:
    """The texts that a recording is aligned with."""
    rng = random.Random(seed)
    lines: list[Line] = [(number, said.text) for number, said in enumerate(long.said)]
    count = round(CHANGED * len(lines))
    gone = set(rng.sample(range(len(lines)), count))
    more = [*lines]
    for text in others[:count]:
        more.insert(rng.randrange(len(more) + 1), (None, text))
    return {
        "as it is": lines,
        "10 % missing": [line for line in lines if line[0] not in gone],
        "10 % added": more,
        "of another": [(None, text) for text in others[: len(lines)]],
    }


@dataclass
class Count:
    """What is counted of utterances; see the top of the file."""

    known: int = 0
    kept: int = 0
    wrong: int = 0
    utterances: int = 0
    right: int = 0
    ends: int = 0
    near: tuple[int, int, int] = (0, 0, 0)
    seconds: float = 0.0

    def add(
        self, pieces: Sequence[Piece], long: Long, lines: Sequence[Line], normalize: Normalizer
    ) -> None:
        """Counts the pieces of a recording."""
        owners = [
            (number, place)
            for number, text in lines
            for place in range(len(normalize(text).split()))
        ]  # fmt: skip
        self.known += sum(number is not None for number, _ in owners)
        spoken = [
            (sum(word) / 2, (number, place))
            for number, said in enumerate(long.said)
            for place, word in enumerate(said.words)
        ]
        cursor = 0
        for piece in pieces:
            count = len(normalize(piece.text).split())
            words, cursor = owners[cursor : cursor + count], cursor + count
            if piece.reason or not words:
                continue
            inside = [word for middle, word in spoken if piece.start <= middle <= piece.end]
            self.utterances += 1
            self.seconds += piece.end - piece.start
            self.right += words == inside
            missing = sum(word not in set(inside) for word in words)
            self.wrong += missing
            self.kept += count - missing
            self._add_ends(piece, words, long)

    def _add_ends(self, piece: Piece, words: Sequence[tuple[int | None, int]], long: Long) -> None:
        (first, place), (last, last_place) = words[0], words[-1]
        times = [s.start for s in long.said], [s.end for s in long.said]
        if first is not None and place == 0:
            before = times[1][first - 1] if first else 0.0
            self._end(max(before - piece.start, piece.start - times[0][first]))
        if last is not None and last_place == len(long.said[last].words) - 1:
            after = times[0][last + 1] if last + 1 < len(long.said) else 1e9
            self._end(max(times[1][last] - piece.end, piece.end - after))

    def _end(self, off: float) -> None:
        self.ends += 1
        self.near = tuple(n + (off <= most) for n, most in zip(self.near, (0.02, 0.2, 0.5)))  # type: ignore[assignment]  # noqa: B905

    def row(self) -> list[str]:
        """For a table."""

        def share(part: float, of: float) -> str:
            return f"{100 * part / of:.1f}" if of else "-"

        return [
            share(self.kept, self.known), share(self.right, self.utterances),
            share(self.wrong, self.kept + self.wrong), str(self.utterances),
            f"{self.seconds / 60:.1f}", *(share(n, self.ends) for n in self.near),
        ]  # fmt: skip


def evaluate(args: argparse.Namespace) -> None:
    """Prints the tables."""
    aligner, _ = make_aligner(args)
    names = aligner.tokenizer.tokens
    together = [join(rows, aligner, seed) for seed, rows in
                enumerate(groups(args.corpus, args.minutes, args.limit))]  # fmt: skip
    counts: dict[tuple[str, float], Count] = {}
    computing = {"hearing": 0.0, "aligning": 0.0}
    errors = letters = 0
    for number, long in enumerate(together):
        begin = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            heard = hear(aligner.model, iter([long.samples]), Path(folder), lambda _: None)
        heard = replace(heard, log_probs=np.array(heard.log_probs))
        computing["hearing"] += time.process_time() - begin
        for said in long.said:
            first, end = round(said.start / OUTPUT_SECONDS) - 1, round(said.end / OUTPUT_SECONDS)
            wanted = aligner.normalizer(said.text)
            transcript = heard.transcript(names, first, end + 1)
            errors += kaldialign.edit_distance([*wanted], [*transcript])["total"]
            letters += len(wanted)
        others = [said.text for said in together[number - 1].said]
        for name, lines in changed(long, others, number).items():
            begin = time.process_time()
            for threshold, pieces in _cut(aligner, heard, lines, names):
                counts.setdefault((name, threshold), Count()).add(
                    pieces, long, lines, aligner.normalizer
                )
            computing["aligning"] += time.process_time() - begin
    head = ["text", "confidence", "words", "right", "wrong", "utterances", "minutes"]
    table = Table(*head, "in 0", "in 0.2", "in 0.5")
    for (name, threshold), count in counts.items():
        table.add_row(name, f"{threshold:g}", *count.row())
    Console(width=120).print(table)
    seconds = sum(len(long.samples) for long in together) / SAMPLING_RATE
    print(f"CER of what the CTC head hears: {100 * errors / letters:.1f} %")
    print(f"{len(together)} recordings, {seconds / 60:.1f} min; CPU seconds: {computing}")


def _cut(
    aligner: Aligner, heard: Heard, lines: Sequence[Line], names: Sequence[str]
) -> Iterator[tuple[float, list[Piece]]]:
    joined = "\n".join(text for _, text in lines)
    text = read_long_text(joined, aligner.normalizer, aligner.tokenizer, "the text")
    timed = align(heard, text, names)
    for threshold in THRESHOLDS:
        pieces = Cutter(heard, text, timed, Limits(2, 20, threshold), names, " ")()
        yield threshold, without_chance(pieces, heard.frames * OUTPUT_SECONDS)


def write(args: argparse.Namespace) -> None:
    """Writes long recordings and their texts."""
    args.write.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(groups(args.corpus, args.minutes, args.limit)):
        long = join(rows, None, number)
        soundfile.write(args.write / f"{number:03d}.flac", long.samples, SAMPLING_RATE)
        text = "\n".join(said.text for said in long.said) + "\n"
        (args.write / f"{number:03d}.txt").write_text(text, encoding="utf-8")


def main() -> None:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--exp", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--language")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--limit", type=int, help="short recordings to use")
    parser.add_argument("--write", type=Path, metavar="OUT")
    args = parser.parse_args()
    (write if args.write else evaluate)(args)


if __name__ == "__main__":
    main()
