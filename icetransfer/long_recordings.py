"""Cuts long recordings with the text of the whole into utterances to train on.

    python -m icetransfer.long_recordings --exp egs/nl/exp/NAME --out DIR chapter-1.mp3 ...
    python -m icetransfer.long_recordings --exp egs/nl/exp/NAME --out DIR FOLDER
    python -m icetransfer.long_recordings --checkpoint ctc.pt --tokenizer bpe.model --language nl
                                          --out DIR recordings.tsv

The text of chapter-1.mp3 is chapter-1.txt beside it: plain UTF-8, with punctuation and line breaks
as they come.  FOLDER is a folder of such pairs.  A table has a recording a line: path, text file,
and perhaps the speaker, separated by tabs, relative to the table.

The CTC head of a model aligns text and audio.  It need not be good: a model that was fine-tuned on
minutes of the language will do.  What is not in both, and what is not sure, is left out.  DIR then
has transcripts.tsv, which a recipe reads with `kind: folder`, rejected.tsv with the reason for all
that was left out, and summary.md.  The audio stays where it is.  Recordings that are done are
skipped, so a run that was killed goes on.  docs/long_recordings.md says how well this works.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import soundfile

from icetransfer.data.long.anchors import held_entries, runs, sections
from icetransfer.data.long.cutting import Cutter, Limits, Piece
from icetransfer.data.long.heard import OUTPUT_SECONDS, Heard, letters_of
from icetransfer.data.long.ledger import Found, Ledger, LongRecording, write_copies
from icetransfer.data.long.path import Timed, align_section
from icetransfer.data.long.words import LongText, read_long_text
from icetransfer.data.readers.folder import TRANSCRIPTS
from icetransfer.data.readers.tables import is_utf8, read_lines
from icetransfer.data.text.normalizer import Normalizer
from icetransfer.data.tokenizer import Tokenizer
from icetransfer.data.utterances import UNKNOWN_SPEAKER
from icetransfer.experiment import log, main, open_experiment
from icetransfer.model.checkpoint import load_transducer
from icetransfer.model.transducer import TransducerModel
from icetransfer.stage.command import command_parser
from icetransfer.stage.lock import locked
from icetransfer.stage.progress import minutes_of, progress_bar
from icetransfer.stage.stamp import sha256
from icetransfer.streaming import audio
from icetransfer.streaming.posteriors import hear

VERSION = "1"  # raised when the same inputs give other utterances
SHORTEST_SECTION = 10.0  # seconds between two anchors at which a recording is parted
#: Of a recording's words: with less of them kept, the text may be another's.
LITTLE = 0.2
#: Of a recording and of its text: less may be kept of a text that is another's.
BY_CHANCE = 0.05


@dataclass(frozen=True)
class Aligner:
    """A model that aligns a language.

    Attributes:
        model: with a CTC head.
        tokenizer: of the model.
        normalizer: of the language.
    """

    model: TransducerModel
    tokenizer: Tokenizer
    normalizer: Normalizer


def make_aligner(args: argparse.Namespace) -> tuple[Aligner, dict[str, str]]:
    """Loads the model of an experiment or of a checkpoint, and says what it was made from.

    Raises:
        ValueError: there is no such model, it has no CTC head, or its tokens are others.
    """
    if args.exp:
        experiment = open_experiment(args.exp)
        checkpoint = experiment.averaged_checkpoint
        tokens, language = experiment.lang_dir / "bpe.model", experiment.config.language
        if not checkpoint.is_file():
            raise ValueError(f"{checkpoint} does not exist: run the recipe up to stage 7")
    elif args.checkpoint and args.tokenizer and args.language:
        checkpoint, tokens, language = args.checkpoint, args.tokenizer, args.language
    else:
        raise ValueError("give --exp DIR, or --checkpoint, --tokenizer and --language together")
    normalizer = Normalizer(language)
    model = load_transducer(checkpoint)
    if model.ctc_output is None:
        raise ValueError(
            f"{checkpoint} has no CTC head, which the alignment needs. Fine-tune it with a recipe "
            f"on what transcribed speech there is: transfer.ctc, which is on, gives it one; then "
            f"--exp with that experiment"
        )
    if not tokens.is_file():
        raise ValueError(f"{tokens} does not exist: expected the tokenizer of {checkpoint}")
    tokenizer = Tokenizer(tokens)
    if tokenizer.vocab_size != model.vocab_size:
        raise ValueError(
            f"{tokens} has {tokenizer.vocab_size} tokens and {checkpoint} {model.vocab_size}: it "
            f"is another model's"
        )
    made_from = {
        "version": VERSION,
        "checkpoint": sha256(checkpoint),
        "tokenizer": sha256(tokens),
        "text rules": normalizer.version,
    }
    return Aligner(model, tokenizer, normalizer), made_from


def find_recordings(inputs: Sequence[Path]) -> tuple[list[LongRecording], list[str]]:
    """The recordings that are named, and what is wrong with others.

    Args:
        inputs: recordings, folders of them, or tables.

    Raises:
        ValueError: there are none.
    """
    found: list[LongRecording] = []
    problems: list[str] = []
    for path in inputs:
        if not path.exists():
            problems.append(f"{path} does not exist")
            continue
        if path.suffix in (".tsv", ".gz"):
            candidates = _of_table(path, problems)
        elif path.is_dir():
            candidates = _of_folder(path)
        else:
            candidates = iter([LongRecording(path, path.with_suffix(".txt"), UNKNOWN_SPEAKER)])
        for recording in candidates:
            if not recording.audio.is_file():
                problems.append(f"{recording.audio} does not exist")
            elif not recording.text.is_file():
                problems.append(
                    f"{recording.audio}: {recording.text} does not exist; write what is said in "
                    f"the recording there, as plain text"
                )
            else:
                found.append(recording)
    found = [*dict.fromkeys(found)]
    if not found:
        listed = "\n".join(problems)
        raise ValueError(
            listed
            or f"no recordings in {', '.join(map(str, inputs))}: expected audio files, each "
            f"with its text beside it, chapter.mp3 and chapter.txt"
        )
    return found, problems


def _of_folder(folder: Path) -> Iterator[LongRecording]:
    known = {f".{name.lower()}" for name in soundfile.available_formats()} | {".opus", ".m4a"}
    files = sorted(path for path in folder.rglob("*") if not path.name.startswith("."))
    for path in files:
        text = path.with_suffix(".txt")
        if path != text and path.is_file() and (path.suffix.lower() in known or text.is_file()):
            yield LongRecording(path, text, UNKNOWN_SPEAKER)


def _of_table(table: Path, problems: list[str]) -> Iterator[LongRecording]:
    for number, line in read_lines(table):
        cells = [cell.strip() for cell in line.split("\t")]
        if not is_utf8(line) or len(cells) not in (2, 3):
            problems.append(
                f"{table}:{number}: expected path, text file and perhaps speaker, tab-separated, "
                f"in UTF-8; got {len(cells)} columns"
            )
            continue
        if number == 1 and cells[0] == "path":
            continue
        speaker = cells[2] if len(cells) == 3 and cells[2] else UNKNOWN_SPEAKER
        yield LongRecording(table.parent / cells[0], table.parent / cells[1], speaker)


def align(heard: Heard, text: LongText, names: Sequence[str]) -> dict[int, Timed]:
    """When each entry of a text was said, by its number; those that were not heard are absent."""
    entry_letters = [sum(len(letters_of(names[t])) for t in e.tokens) for e in text.entries]
    wanted = "".join(letters_of(names[token]) for e in text.entries for token in e.tokens)
    letters, letter_frames = heard.letters(names)
    shortest = round(SHORTEST_SECTION / OUTPUT_SECONDS)
    timed: dict[int, Timed] = {}
    found = runs(letters, wanted)
    phrases = [entry.phrase for entry in text.entries]
    anchored = {phrases[i] for i in held_entries(found, entry_letters)}
    for section in sections(found, letter_frames, entry_letters, phrases, heard.frames, shortest):
        timed |= align_section(heard, text.entries, section, anchored)
    return timed


def read_text_file(path: Path) -> str:
    """The text of a recording, in UTF-8 or UTF-16.

    Raises:
        ValueError: it is in another encoding.
    """
    lines = [line for _, line in read_lines(path)]
    if not all(map(is_utf8, lines)):
        raise ValueError(f"{path} is not UTF-8: save it as UTF-8")
    return "\n".join(lines)


def cut_recording(
    aligner: Aligner,
    recording: LongRecording,
    limits: Limits,
    ledger: Ledger,
    copies: bool,
    done: Callable[[float], None],
) -> Found:
    """Cuts a recording into utterances.

    Raises:
        ValueError: the audio or the text cannot be used.
    """
    normalizer, names = aligner.normalizer, aligner.tokenizer.tokens
    source = str(recording.audio)
    if not copies:
        _check_channels(recording.audio)
    text = read_long_text(
        read_text_file(recording.text), normalizer, aligner.tokenizer, str(recording.text)
    )
    heard = hear(aligner.model, audio.read_file(source), ledger.folder, done)
    join = "" if normalizer.spaceless else " "
    pieces = Cutter(heard, text, align(heard, text, names), limits, names, join)()
    pieces = without_chance(pieces, heard.frames * OUTPUT_SECONDS)
    path = ledger.name(recording)
    utterances = [piece for piece in pieces if not piece.reason]
    if copies:
        write_copies(ledger, path, utterances, audio.read_file(source))
    words, kept_words = (
        sum(len(p.text.replace(" ", "") if normalizer.spaceless else p.text.split()) for p in of)
        for of in (pieces, [p for p in pieces if not p.reason])
    )
    seconds = heard.frames * OUTPUT_SECONDS
    return Found(path, recording.speaker, seconds, words, kept_words, pieces)


def without_chance(pieces: list[Piece], seconds: float) -> list[Piece]:
    """What was found in a recording; nothing, if that is next to nothing of it and of its text.

    Args:
        pieces: utterances and what is not kept.
        seconds: of the recording.
    """
    kept = [piece for piece in pieces if not piece.reason]
    of_text = sum(len(p.text) for p in kept) / max(sum(len(p.text) for p in pieces), 1)
    if of_text >= BY_CHANCE or sum(p.end - p.start for p in kept) >= BY_CHANCE * seconds:
        return pieces
    reason = "hardly anything else of the text was found"
    return [p if p.reason else p._replace(reason=reason) for p in pieces]


def _check_channels(path: Path) -> None:
    try:
        channels = soundfile.info(path).channels
    except soundfile.SoundFileError:
        return  # said better when it is read
    if channels != 1:
        raise ValueError(
            f"{path} has {channels} channels, and recipes read files of one: add --copy, which "
            f"writes utterances of one channel, or convert it: ffmpeg -i {path} -ac 1 OUT.flac"
        )


def cut_all(
    aligner: Aligner,
    recordings: Sequence[LongRecording],
    limits: Limits,
    ledger: Ledger,
    copies: bool,
) -> tuple[list[Found], list[str]]:
    """Cuts all recordings that are not done, and writes the tables of all after each.

    Returns:
        What was found, and what is wrong with recordings that could not be cut.
    """
    results: list[Found] = []
    problems: list[str] = []
    todo: dict[LongRecording, float] = {}
    for recording in recordings:
        try:
            seconds = audio.duration(str(recording.audio))
        except ValueError as error:
            problems.append(str(error))
            continue
        if (found := ledger.load(recording)) is not None:
            results.append(found)
        else:
            todo[recording] = seconds
    if results:
        log.info("skip: %d of %d recordings are done", len(results), len(recordings))
    with progress_bar(minutes_of()) as bar:
        task = bar.add_task("aligning", total=sum(todo.values()) / 60)
        for recording in todo:
            try:
                found = cut_recording(
                    aligner, recording, limits, ledger, copies,
                    lambda seconds: bar.advance(task, seconds / 60),
                )  # fmt: skip
            except ValueError as error:
                problems.append(str(error))
                continue
            ledger.save(recording, found)
            results.append(found)
            results.sort(key=lambda one: one.path)
            ledger.write_tables(results)
    ledger.write_tables(results)
    return results, problems


def _run(args: argparse.Namespace) -> None:
    limits = Limits(args.min_seconds, args.max_seconds, args.min_confidence)
    if not 0 < limits.shortest < limits.longest:
        raise ValueError(
            f"--min-seconds {limits.shortest:g} and --max-seconds {limits.longest:g}: expected "
            f"two lengths above 0, the first the smaller"
        )
    recordings, problems = find_recordings(args.inputs)
    aligner, made_from = make_aligner(args)
    made_from["limits"] = f"{limits.shortest:g} {limits.longest:g} {limits.confidence:g}"
    with locked(args.out, "long_recordings", waits=False):
        ledger = Ledger(args.out, made_from, args.copy)
        results, more = cut_all(aligner, recordings, limits, ledger, args.copy)
    for found in results:
        if found.kept_share < LITTLE:
            log.warning(
                "%s: %.0f %% of its %d words were found: is its text that of another recording, or "
                "the model too weak? %s says what it heard",
                found.path, 100 * found.kept_share, found.words, args.out / "rejected.tsv",
            )  # fmt: skip
    log.info(
        "%d utterances, %.1f of %.1f minutes, %d of %d words -> %s",
        sum(len(found.utterances) for found in results),
        sum(found.kept_seconds for found in results) / 60,
        sum(found.seconds for found in results) / 60,
        sum(found.kept_words for found in results),
        sum(found.words for found in results),
        args.out / TRANSCRIPTS,
    )
    if problems + more:
        raise ValueError("\n".join(problems + more))


def _main() -> None:
    parser = command_parser(__doc__, "docs/long_recordings.md")
    parser.add_argument("inputs", nargs="+", type=Path, metavar="FILE|FOLDER|TABLE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the corpus to be")
    parser.add_argument("--exp", type=Path, help="experiment whose model aligns, after stage 7")
    parser.add_argument("--checkpoint", type=Path, help="model with a CTC head, in place of --exp")
    parser.add_argument("--tokenizer", type=Path, help="the checkpoint's bpe.model")
    parser.add_argument("--language", help="code of the language, whose text rules are used")
    parser.add_argument(
        "--min-confidence", type=float, default=0.4, metavar="P",
        help="what is less sure is left out (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--min-seconds", type=float, default=2.0, metavar="S",
        help="of an utterance (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--max-seconds", type=float, default=20.0, metavar="S",
        help="of an utterance (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--copy", action="store_true", help="write each utterance as a FLAC of its own"
    )
    args = parser.parse_args()
    main(lambda: _run(args))


if __name__ == "__main__":
    _main()
