"""What a bundle hears in recordings of any length, at standard input or at a microphone.

    python -m icetransfer.transcribe --bundle egs/nl/exp/NAME/bundle --latency 320 FILE...
    ffmpeg -i talk.mp4 -f wav -ac 1 - | python -m icetransfer.transcribe --bundle DIR -
    python -m icetransfer.transcribe --bundle DIR --microphone
    python -m icetransfer.transcribe --bundle DIR --vtt --out subtitles *.flac
    python -m icetransfer.transcribe --bundle DIR --hotwords names.txt FILE...

A bundle is a folder that stage 11 makes, or an export of stage 8, or a folder with several tiers,
from which --latency chooses.  Recordings are WAV, FLAC, MP3 and what else libsndfile reads, at any
sampling rate; channels are mixed.

A line is printed for each segment, the words between two pauses: its beginning and end in seconds
and its text, parted by tabs (with several files, after the file's name).  --json has each word's
times and confidence besides.  On a terminal the last line shows the segment that is being spoken,
or how far the files are.  The pause that ends a segment, and the confidence below which one is
taken for noise and left out, come with the bundle.  Files are recognised side by side, one on each
processor, and printed in the order in which they were given.  --hotwords makes names and terms
likelier (docs/hotwords.md).
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

from icetransfer.bundle.check import FILE
from icetransfer.bundle.tiers import find_tiers, open_tier, precisions_of
from icetransfer.config import chunk_label
from icetransfer.data.text.normalizer import Normalizer, languages
from icetransfer.data.tokenizer import Tokenizer
from icetransfer.data.utterances import SAMPLING_RATE
from icetransfer.experiment import log, main
from icetransfer.stage import atomic
from icetransfer.stage.command import command_parser
from icetransfer.stage.json_file import read_json
from icetransfer.stage.progress import minutes_of, progress_bar
from icetransfer.streaming import audio
from icetransfer.streaming.audio import STANDARD_INPUT, Samples
from icetransfer.streaming.captions import Captions, JsonLines, SubRip, WebVtt
from icetransfer.streaming.exported import Exported
from icetransfer.streaming.hotwords import SCORE, Hotword, read_hotwords, warn_of_high_scores
from icetransfer.streaming.segments import Listener, Segment

FORMATS = {"json": JsonLines, "srt": SubRip, "vtt": WebVtt}


def find_tier(folder: Path, latency: str | None) -> tuple[Exported, int]:
    """The bundle that a folder is, or the one of its tiers with that latency.

    Tiers that are half written or damaged are named in the log, unless one is asked for.

    Args:
        folder: a bundle, or a folder of bundles.
        latency: the chunk in milliseconds, or "offline"; None where there is one tier only.

    Returns:
        The bundle and its chunk size, -1 for offline.

    Raises:
        ValueError: there is no such bundle.
    """
    tiers, broken = find_tiers(folder)
    if latency is None and len(tiers) == 1:
        latency = next(iter(tiers))
    if latency in tiers:
        for problem in broken:
            log.warning("left out: %s", problem)
        return tiers[latency]
    if broken:
        raise ValueError("\n".join(broken))
    asked = "choose one with --latency" if latency is None else f"not --latency {latency}"
    labels = ", ".join(sorted(tiers, key=lambda label: (len(label), label)))
    raise ValueError(f"{folder} has the latencies {labels}; {asked}")


def make_listener(args: argparse.Namespace) -> Callable[[], Listener]:
    """Loads the bundle; what is returned begins a recording.

    Raises:
        ValueError: there is no such bundle, or it cannot do what is asked.
    """
    bundle, size = find_tier(args.bundle, args.latency)
    precisions = precisions_of(bundle)
    precision = args.precision or precisions[0]
    if precision not in precisions:
        raise ValueError(f"{bundle.dir} has {', '.join(precisions)} and no {precision} models")
    if size == -1 and (args.microphone or STANDARD_INPUT in args.files):
        log.warning("%s is offline: words come when a part of 30 s is full", bundle.dir)
    listen = open_tier(
        bundle,
        size,
        precision,
        args.blank_penalty,
        args.min_confidence,
        find_hotwords(args, bundle),
        use_language_model=not args.no_lm,
    )
    log.info("%s: %s, %s", bundle.dir, precision, chunk_label(size))
    return listen


def find_hotwords(args: argparse.Namespace, bundle: Exported) -> list[Hotword]:
    """What --hotwords names, in the bundle's tokens and spelt as its language is.

    Raises:
        ValueError: there is no such file, the bundle has no bpe.model, or lines are wrong.
    """
    if args.hotwords is None:
        return []
    tokenizer = Tokenizer(bundle.dir / "bpe.model")
    language = ""
    if (bundle.dir / FILE).is_file():
        language = read_json(bundle.dir / FILE, ()).get("language", "")
    normalize = Normalizer(language) if language in languages() else str
    found = read_hotwords(
        args.hotwords,
        tokenizer.encode,
        tokenizer.unknown_characters,
        normalize,
        args.hotwords_score,
    )
    warn_of_high_scores(found)
    return found


class Screen:
    """Prints segments to standard output; on a terminal the one being spoken stands below them."""

    def __init__(self, captions: Captions) -> None:
        self._captions = captions
        self._is_terminal = sys.stdout.isatty() and type(captions) is Captions
        self._shown = ""
        self._write(captions.head)

    def segments(self, segments: list[Segment]) -> None:
        """Prints segments that have ended."""
        if segments:
            self.partial("")
        for segment in segments:
            self._write(self._captions(segment))

    def partial(self, text: str) -> None:
        """Shows the end of a text that may still change, in place of the one before."""
        if not self._is_terminal or text == self._shown:
            return
        width = shutil.get_terminal_size().columns - 1
        self._shown = text
        self._write("\r\x1b[K" + text[-width:])

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def transcribe_live(listener: Listener, pieces: Iterator[Samples], captions: Captions) -> None:
    """Prints what is heard as it is heard, until its end or Ctrl-C; then the last words."""
    screen = Screen(captions)
    try:
        for samples in pieces:
            screen.segments(listener.accept(samples))
            partial = listener.partial()
            screen.partial(partial.text if partial else "")
    except KeyboardInterrupt:
        log.info("")  # below the ^C
    screen.segments(listener.finish())
    screen.partial("")


class FileJob:
    """A file that is recognised by a thread; its segments wait in a queue."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.seconds = 0.0  # heard so far
        self._queue: queue.SimpleQueue[Segment | Exception | None] = queue.SimpleQueue()

    def run(self, listen: Callable[[], Listener], stop: threading.Event) -> None:
        """Recognises the file; what goes wrong waits in the queue too."""
        try:
            listener = listen()
            for samples in audio.read_file(self.file):
                if stop.is_set():
                    break
                self.seconds += len(samples) / SAMPLING_RATE
                self._put(listener.accept(samples))
            self._put(listener.finish())
            self._queue.put(None)
        except Exception as error:  # of a thread: it is raised again by `segments`
            self._queue.put(error)

    def _put(self, segments: list[Segment]) -> None:
        for segment in segments:
            self._queue.put(segment)

    def segments(self, tick: Callable[[], None]) -> Iterator[Segment]:
        """The segments as they end; meanwhile `tick` is called some times a second."""
        while True:
            tick()
            try:
                found = self._queue.get(timeout=0.2)
            except queue.Empty:
                continue
            if found is None:
                return
            if isinstance(found, Exception):
                raise found
            yield found


def transcribe_files(
    listen: Callable[[], Listener],
    files: list[str],
    output: Callable[[str], AbstractContextManager[tuple[Captions, TextIO | None]]],
    threads: int,
) -> list[str]:
    """Recognises files side by side and writes their segments in the order of the files.

    Args:
        listen: begins a recording.
        files: their paths.
        output: gives how and where a file's segments are written; None for standard output.
        threads: files at a time.

    Returns:
        What is wrong with files that could not be read.
    """
    jobs = {file: FileJob(file) for file in files}
    problems, durations = [], {}
    for file in [*jobs]:
        try:
            durations[file] = audio.duration(file)
        except ValueError as error:  # the other files are done all the same
            problems.append(str(error))
            del jobs[file]
    stop = threading.Event()
    piped = None if sys.stdout.isatty() else sys.stdout  # the bar would take it for a terminal
    with ExitStack() as stack:
        bar = stack.enter_context(progress_bar(minutes_of()))
        task = bar.add_task("transcribing", total=sum(durations.values()) / 60)
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        stack.callback(stop.set)
        for job in jobs.values():
            pool.submit(job.run, listen, stop)

        def tick() -> None:
            bar.update(task, completed=sum(job.seconds for job in jobs.values()) / 60)

        for job in jobs.values():
            try:
                with output(job.file) as (captions, target):
                    out = target or piped
                    print(captions.head, end="", file=out)
                    for segment in job.segments(tick):
                        print(captions(segment), end="", file=out, flush=True)
            except ValueError as error:
                problems.append(str(error))
        bar.update(task, completed=sum(durations.values()) / 60)
    return problems


def _run(args: argparse.Namespace) -> None:
    kind = next((FORMATS[name] for name in FORMATS if getattr(args, name)), Captions)
    if len(args.files) > 1 and kind in (SubRip, WebVtt) and not args.out:
        raise ValueError("subtitles of several files need a folder, for a file each: --out DIR")
    listen = make_listener(args)
    live = [audio.microphone(args.device)] if args.microphone else []
    live += [audio.read_standard_input()] if STANDARD_INPUT in args.files else []
    for pieces in live:
        transcribe_live(listen(), pieces, kind())
    files = [*dict.fromkeys(file for file in args.files if file != STANDARD_INPUT)]
    if not files:
        return
    if args.out:
        targets = [Path(file).with_suffix(kind.suffix).name for file in files]
        if twice := next((name for name in targets if targets.count(name) > 1), None):
            raise ValueError(f"two files would be written to {args.out / twice}: rename one")

    @contextmanager
    def output(file: str) -> Iterator[tuple[Captions, TextIO | None]]:
        if not args.out:
            yield kind(file if len(files) > 1 else None), None
            return
        path = args.out / Path(file).with_suffix(kind.suffix).name
        with atomic.atomic_path(path) as partial, partial.open("w", encoding="utf-8") as target:
            yield kind(), target

    problems = transcribe_files(listen, files, output, args.threads)
    if problems:
        raise ValueError("\n".join(problems))


def _run_for_readers(args: argparse.Namespace) -> None:
    try:
        _run(args)
    except BrokenPipeError:  # who reads what is printed has enough of it, as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _main() -> None:
    parser = command_parser(__doc__, "docs/transcribe.md")
    parser.add_argument("files", nargs="*", metavar="FILE", help="sound file, - for standard input")
    parser.add_argument("--bundle", type=Path, required=True, help="folder, or folder of tiers")
    parser.add_argument("--latency", metavar="MS|offline", help="which tier: 160, 320, ...")
    parser.add_argument("--precision", help="fp32, int8, ... (fp32, or the first that there is)")
    parser.add_argument("--microphone", action="store_true", help="listen until Ctrl-C")
    parser.add_argument("--device", help="the microphone's number or a part of its name")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="a JSON object for each segment")
    form.add_argument("--srt", action="store_true", help="SubRip subtitles")
    form.add_argument("--vtt", action="store_true", help="WebVTT subtitles, with times of words")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a file there for each FILE")
    parser.add_argument(
        "--min-confidence", type=float, metavar="P",
        help="leave out segments below it; 0 keeps all (default: the bundle's)",
    )  # fmt: skip
    parser.add_argument(
        "--blank-penalty", type=float, default=0.0, metavar="X",
        help="above 0: fewer words are missed and more are made up (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--hotwords", type=Path, metavar="FILE",
        help="names and terms to expect, a phrase a line, with a score of its own as :2 or not",
    )  # fmt: skip
    parser.add_argument(
        "--hotwords-score", type=float, default=SCORE, metavar="X",
        help="what each of their tokens is worth (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--no-lm", action="store_true", help="without the bundle's language model, if it has one"
    )
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, metavar="N",
        help="files at a time (default: the processors)",
    )  # fmt: skip
    args = parser.parse_args()
    if not args.files and not args.microphone:
        parser.error("give sound files, - for standard input, or --microphone")
    main(lambda: _run_for_readers(args))


if __name__ == "__main__":
    _main()
