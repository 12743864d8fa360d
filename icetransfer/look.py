"""A look at the data before anything is trained: what there is, what may be wrong.

    python -m icetransfer.look --exp DIR          after stage 1
    python -m icetransfer.look --exp DIR --cer    after stage 7: with the model's CER, too

Prints hours, speakers, lengths and speaking rates, characters that are rare or outside the
alphabet, the longest and the fastest utterances, likely mismatches of audio and text, copies, and
what training shares with dev and test.  Writes the same with figures, and players for the twenty
worst utterances, as DIR/look/look.html: one file, to be opened anywhere.  Every suspect stands in
DIR/look/suspects.tsv.  docs/look.md says what the numbers mean, and what to do about them.

With --cer the experiment's model recognises every training utterance first.  What it has done is
kept, so it can be stopped and run again, and later looks show it without --cer.
"""

from __future__ import annotations

import base64
import copy
import csv
import functools
import io
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from lhotse import set_current_audio_backend
from lhotse.audio.backend import LibsndfileBackend
from lhotse.cut import Cut
from lhotse.serialization import deserialize_item
from torch import Tensor

from icetransfer import score
from icetransfer.config import Config
from icetransfer.data.jsonl import read_jsonl_gz, write_jsonl_gz
from icetransfer.data.survey.columns import Manifest, Survey, survey
from icetransfer.data.survey.findings import Cers, Findings, Utterance, look
from icetransfer.data.survey.letters import read_left_out
from icetransfer.data.text.normalizer import Normalizer
from icetransfer.data.tokenizer import Tokenizer
from icetransfer.data.utterances import SAMPLING_RATE
from icetransfer.decode import Reader, decode_offline, make_rows
from icetransfer.experiment import (
    Experiment,
    enter_recipe,
    log,
    open_experiment,
    provenance,
    run_logged,
    stage_parser,
)
from icetransfer.model.checkpoint import load_transducer
from icetransfer.report.page import Clip, to_html
from icetransfer.report.survey import document
from icetransfer.report.terminal import show_document
from icetransfer.stage import atomic
from icetransfer.stage.progress import progress_bar
from icetransfer.stage.stamp import sha256
from icetransfer.streaming.search import SHERPA, make_search

PAGE = "look.html"
SUSPECTS = "suspects.tsv"
PART = 500  # utterances that are recognised together: what a kill costs
_BATCH = 64  # recordings at a time, at most; `decode_offline` bounds their seconds
_CLIP_SECONDS = 20  # of a player
_REASON = 150  # characters of why there is no audio: lhotse tells the whole cut
_COMPRESSION = 0.9  # some 22 kbit/s: 45 kB for the longest
_COLUMNS = (
    *("set", "id", "why", "seconds", "characters_per_second", "z", "cer", "text", "heard"),
    "path",
)


@dataclass(frozen=True)
class Recognised:
    """What a model has heard in the training utterances, in parts of 500 in their order.

    Attributes:
        folder: A folder for each model and manifest lies in it.
        model: Digest of the model; None where there is none.
    """

    folder: Path
    model: str | None

    @classmethod
    def of(cls, experiment: Experiment) -> Recognised:
        """Of an experiment's model as it is now."""
        path = experiment.averaged_checkpoint
        model = sha256(path)[:12] if path.is_file() else None
        return cls(experiment.dir / "look" / "recognised", model)

    def part(self, manifest: Manifest, number: int) -> Path:
        """The file of a part."""
        made_from = f"{self.model}-{_digest(manifest.path)}"
        return self.folder / made_from / f"{number:06d}.jsonl.gz"

    def cers(self, survey: Survey) -> Cers:
        """CER in percent of every utterance that was recognised; not a number elsewhere."""
        found = np.full(len(survey), np.nan, np.float32)
        for manifest in _training(survey) if self.model else ():
            for number, first in enumerate(range(manifest.first, manifest.last, PART)):
                if (part := self.part(manifest, number)).is_file():
                    for row, line in enumerate(read_jsonl_gz(part), first):
                        found[row] = np.nan if line["cer"] is None else line["cer"]
        return found

    def heard(self, survey: Survey, row: int) -> str:
        """The model's words in an utterance; "" if it has not recognised it."""
        manifest = survey.manifest_of(row)
        if manifest.split != "train" or not self.model:
            return ""
        number, place = divmod(row - manifest.first, PART)
        part = self.part(manifest, number)
        return _words(part)[place] if part.is_file() else ""


@functools.cache
def _digest(path: Path) -> str:
    return sha256(path)[:12]


@functools.lru_cache(maxsize=4)
def _words(part: Path) -> list[str]:
    return [line["heard"] for line in read_jsonl_gz(part)]


def _training(survey: Survey) -> list[Manifest]:
    return [manifest for manifest in survey.manifests if manifest.split == "train"]


class _Encoder:
    """A model's encoder on the best device there is, with the context that it was trained for."""

    def __init__(self, model: Any, config: Config) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = copy.deepcopy(model).to(self._device)
        sizes = config.train.chunk_sizes
        self._chunk_size = -1 if -1 in sizes else max(sizes)
        self._left = -1 if self._chunk_size == -1 else max(config.train.left_context_frames)

    def encode(self, features: Tensor, feature_lens: Tensor) -> tuple[Tensor, Tensor]:
        """See `decode.EncodesWhole`."""
        out, lens = self._model.encode(
            features.to(self._device), feature_lens.to(self._device), self._chunk_size, self._left
        )
        return out.cpu(), lens.cpu()


def recognise(experiment: Experiment, survey: Survey) -> None:
    """Recognises every training utterance that the model has not recognised, by greedy search.

    Raises:
        ValueError: There is no model yet.
    """
    if not experiment.averaged_checkpoint.is_file():
        raise ValueError(
            f"{experiment.averaged_checkpoint} does not exist: run stage 7, which makes it, or "
            f"look without --cer"
        )
    done = Recognised.of(experiment)
    model = load_transducer(experiment.averaged_checkpoint)
    heads: Any = model  # whose context_size is no variable
    search = make_search("greedy_search", heads, 1, SHERPA)
    encoder = _Encoder(model, experiment.config)
    tokenizer = Tokenizer(experiment.lang_dir / "bpe.model")
    manifests = _training(survey)
    with progress_bar() as progress:
        bar = progress.add_task("recognised", total=sum(m.last - m.first for m in manifests))
        for manifest in manifests:
            normalize = Normalizer(manifest.language)
            cuts = read_jsonl_gz(manifest.path)
            for number in itertools.count():
                part = list(map(deserialize_item, itertools.islice(cuts, PART)))
                if not part:
                    break
                target = done.part(manifest, number)
                if not target.is_file():
                    reader = Reader(sorted(part, key=lambda cut: (cut.duration, cut.id)))
                    found = dict(decode_offline(encoder, search, iter(reader), _BATCH))
                    rows = make_rows(part, found, reader.problems, tokenizer, normalize)
                    write_jsonl_gz(target, (_compared(row, normalize.spaceless) for row in rows))
                progress.advance(bar, len(part))


def _compared(row: score.Row, by_character: bool) -> dict[str, Any]:
    """What is kept of a recognised utterance: its CER, and what was heard."""
    errors = score.word_errors if by_character else score.character_errors
    cer = None
    if row["ref"] and row["failed"] is None:
        cer = round(errors([row]).rate, 2)
    return {"id": row["id"], "cer": cer, "heard": row["hyp"]}


def clip(found: Utterance) -> Clip:
    """A player for an utterance, or why there is none."""
    numbers = f"{found.seconds:.1f} s, {found.rate:.1f} characters/s, z {found.z:+.1f}"
    if found.cer is not None:
        numbers += f", CER {found.cer:.0f} %"
    lines = [", ".join(found.reasons), numbers, f"speaker: {found.speaker}", f"text: {found.text}"]
    if found.heard:
        lines.append(f"heard: {found.heard}")
    cut: Cut = deserialize_item(copy.deepcopy(found.cut))  # which it takes apart
    if found.seconds > _CLIP_SECONDS:
        cut = cut.truncate(duration=_CLIP_SECONDS)
        lines.append(f"the first {_CLIP_SECONDS} s of it")
    source = None
    try:
        source = _data_uri(np.asarray(cut.load_audio(), np.float32)[0])
    except Exception as error:  # whatever a decoder raises on a broken file
        reason = " ".join(str(error).split())
        lines.append(f"no audio from {found.path}: {reason[:_REASON]}")
    return Clip(f"{found.where} {found.id}", [line for line in lines if line], source)


def _data_uri(samples: np.ndarray[Any, np.dtype[np.float32]]) -> str:
    """Audio as an MP3 in a URI: every browser plays it."""
    packed = io.BytesIO()
    soundfile.write(
        packed, samples, SAMPLING_RATE, format="MP3", subtype="MPEG_LAYER_III",
        compression_level=_COMPRESSION,
    )  # fmt: skip
    return "data:audio/mpeg;base64," + base64.b64encode(packed.getvalue()).decode("ascii")


def _write_suspects(path: Path, found: Iterator[Utterance]) -> None:
    """Lists the likely wrong utterances, in their order."""
    with atomic.atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(_COLUMNS)
        for one in found:
            cer = "" if one.cer is None else f"{one.cer:.1f}"
            numbers = [f"{one.seconds:.3f}", f"{one.rate:.2f}", f"{one.z:.2f}", cer]
            why = "; ".join(one.reasons)
            writer.writerow([one.where, one.id, why, *numbers, one.text, one.heard, one.path])


def read_survey(experiment: Experiment) -> Survey:
    """Reads the manifests of all corpora of a recipe, with a bar.

    Raises:
        ValueError: Stage 1 has not made them, or they are damaged.
    """
    config = experiment.config
    languages = {
        name: corpus.language or config.language for name, corpus in config.data.corpora.items()
    }
    with progress_bar() as progress:
        bar = progress.add_task("reading", total=None)
        return survey(
            experiment.manifests_dir,
            languages,
            lambda name, done: progress.update(bar, description=f"reading {name}", completed=done),
        )


def write_look(experiment: Experiment, with_cer: bool = False) -> Findings:
    """Looks at an experiment's data, prints what it finds and writes the page.

    Args:
        experiment: Whose recipe it is.
        with_cer: Whether the model is to recognise the training utterances before.

    Raises:
        ValueError: The manifests, or the model that is asked for, are not there.
    """
    set_current_audio_backend(LibsndfileBackend())  # others try many readers on a broken file
    utterances = read_survey(experiment)
    if with_cer:
        recognise(experiment, utterances)
    recognised = Recognised.of(experiment)
    left_out = read_left_out(
        experiment.manifests_dir / f"{name}_rejected.tsv" for name in experiment.config.data.corpora
    )
    findings = look(utterances, left_out, recognised.cers(utterances))
    heard = functools.partial(recognised.heard, utterances)
    shown: Mapping[int, Utterance] = {
        found.row: found for found in findings.utterances(findings.shown, heard)
    }
    folder = experiment.dir / "look"
    _write_suspects(folder / SUSPECTS, findings.utterances(findings.suspects, heard))
    clips = [clip(shown[int(row)]) for row in findings.worst]
    made = document(experiment.config.language, findings, shown, clips, SUSPECTS)
    atomic.write_text(folder / PAGE, to_html(made))
    origin = provenance(utterances=len(utterances), recognised=findings.recognised)
    atomic.write_text(folder / "provenance.json", json.dumps(origin, indent=2) + "\n")
    show_document(made)
    log.info("%s: %d suspects", folder / SUSPECTS, len(findings.suspects))
    size = (folder / PAGE).stat().st_size
    log.info("%s: %.1f MB, with %d players", folder / PAGE, size / 1e6, len(clips))
    if recognised.model and not findings.recognised:
        log.info("with --cer, %s finds more", experiment.averaged_checkpoint)
    return findings


def _main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument(
        "--cer", action="store_true",
        help="let the experiment's model recognise every training utterance first",
    )  # fmt: skip
    args = parser.parse_args()

    def run(experiment: Experiment) -> None:
        write_look(experiment, args.cer)

    run_logged(lambda: open_experiment(enter_recipe(args.exp)), run)


if __name__ == "__main__":
    _main()
