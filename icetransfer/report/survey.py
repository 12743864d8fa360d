"""A look at the data as a document: what to look at first, then the tables, figures and players."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from icetransfer.analysis.gap_report import TableData
from icetransfer.data.survey import pace
from icetransfer.data.survey.findings import Findings, Utterance
from icetransfer.data.survey.letters import RARE
from icetransfer.data.survey.overlaps import Groups
from icetransfer.report.page import (
    Answer,
    Bullets,
    Clip,
    Clips,
    Document,
    Gallery,
    Heading,
    Part,
    TablePart,
    Text,
)
from icetransfer.report.survey_figures import drawings

TITLE_LENGTH = 60  # characters of a text that a table shows
_LETTERS = 20  # strangers that are listed
_FIRST = 5  # rows of a table that the prompt shows
_QUANTILES = (0, 1, 50, 99, 100)
_LEAKS = {
    "recording": "the same recording",
    "place": "another part from the same place of a file",
    "id": "an utterance of the same id",
    "sentence": "an utterance of the same text",
    "speaker": "the same speaker",
}

Shown = Mapping[int, Utterance]


def document(
    name: str, findings: Findings, shown: Shown, clips: Sequence[Clip], listed: str
) -> Document:
    """The page.

    Args:
        name: Of the recipe.
        findings: What was found.
        shown: The utterances of `findings.shown`.
        clips: Players of the worst.
        listed: The file with all suspects, as a link.
    """
    parts: list[Part] = [
        Answer(_verdict(findings), _points(findings)),
        Text("`docs/look.md` says what each number means, and what to do about it."),
        Heading("What there is"),
        TablePart(*_sets(findings)),
        Text("Least, 1 %, median, 99 % and most of an utterance:"),
        TablePart(*_quantiles(findings)),
        Gallery(drawings(findings)),
        Heading("Likely mismatches of audio and text"),
        Text(_rule(findings, listed)),
        Clips(clips),
        TablePart(*_utterances(findings, findings.worst, shown), _FIRST),
        Heading("Characters"),
        *_characters(findings),
        Heading("Longest utterances"),
        TablePart(*_utterances(findings, findings.longest, shown), _FIRST),
        Heading("Fastest utterances"),
        TablePart(*_utterances(findings, findings.fastest, shown), _FIRST),
        Heading("Speakers"),
        *_speakers(findings, shown),
        Heading("There twice"),
        *_twice(findings, shown),
        Heading("Shared with dev and test"),
        *_leaks(findings, shown),
        Heading("Left out by stage 1"),
        *_left_out(findings),
        Heading("lhotse's validator"),
        Bullets(_validated(findings)),
    ]
    return Document(f"A look at the data of {name}", parts)


def _verdict(findings: Findings) -> str:
    problems = len(findings.suspects)
    share = 100 * problems / len(findings.survey)
    if not problems:
        return "No utterance stands out. Listen to the first five below all the same."
    return (
        f"**{problems:,} of {len(findings.survey):,} utterances ({share:.2f} %) stand out, and may "
        f"be wrong.** Listen to the twenty worst below."
    )


def _points(findings: Findings) -> list[str]:
    """What is to be looked at, a line each; nothing of what is in order."""
    outside = [s for s in findings.strangers if s.kind == "outside"]
    lost = sum(findings.left_out.reasons.values())
    copies = findings.copies
    points = {
        f"{len(findings.fast):,} with too much text for their audio, "
        f"{len(findings.slow):,} with too little": len(findings.fast) + len(findings.slow),
        f"{len(findings.misheard):,} in which the model heard something else, of "
        f"{findings.recognised:,} that it recognised": len(findings.misheard),
        f"{copies.all.more:,} recordings are copies of others, {len(copies.differing):,} "
        f"with a text that differs": copies.all.more,
        f"{len(outside):,} characters outside the alphabet": len(outside),
        f"{len(findings.strangers) - len(outside):,} letters in fewer than {RARE} training "
        f"utterances": len(findings.strangers) - len(outside),
        f"{lost:,} utterances were left out by stage 1": lost,
        f"lhotse does not accept {sum(p.found for p in findings.survey.problems):,} cuts": sum(
            p.found for p in findings.survey.problems
        ),
    }
    said = [text for text, count in points.items() if count]
    for leak in findings.leaks:
        said.append(
            f"{leak.held_out.name}: {leak.of_held_out:,} utterances ({leak.share:.1f} %) share "
            f"their {leak.kind} with training"
        )
    return said


def _sets(findings: Findings) -> TableData:
    """Hours, utterances, speakers and sentences of each manifest."""
    survey, lines = findings.survey, []
    for manifest in survey.manifests:
        own = manifest.rows
        seconds = survey.seconds[own]
        speakers = survey.speakers[own]
        nameless = int(np.count_nonzero(speakers == 0))
        lines.append(
            [
                manifest.name,
                f"{seconds.sum(dtype=np.float64) / 3600:,.2f}",
                f"{len(seconds):,}",
                f"{len(np.unique(speakers[speakers != 0])):,}"
                + (f" + {nameless:,} utterances of unknown" if nameless else ""),
                f"{len(np.unique(survey.texts[own])):,}",
            ]
        )
    return ["set", "hours", "utterances", "speakers", "different texts"], lines


def _quantiles(findings: Findings) -> TableData:
    survey, lines = findings.survey, []
    columns: dict[str, NDArray[np.float64]] = {
        "seconds": survey.seconds.astype(np.float64),
        "characters": survey.characters.astype(np.float64),
        "characters/s": survey.rates(),
    }
    for manifest in survey.manifests:
        if manifest.last > manifest.first:
            found = [
                np.percentile(values[manifest.rows], _QUANTILES) for values in columns.values()
            ]
            lines.append(
                [manifest.name, *(" / ".join(f"{v:.{d}f}" for v in values)
                                  for values, d in zip(found, (1, 0, 1), strict=True))]
            )  # fmt: skip
    return ["set", *columns], lines


def _rule(findings: Findings, listed: str) -> str:
    text = (
        f"z compares an utterance's characters a second with those of about as much text: above "
        f"{pace.LIMIT:g} the text is too long for the audio, below −{pace.LIMIT:g} too short. Two "
        f"texts of the same length that were swapped, only a model finds. "
    )
    if findings.recognised:
        text += (
            f"CER: the model's words against the text, of {findings.recognised:,} training "
            f"utterances; suspect from {findings.cer_limit:.0f} % on. "
        )
    return text + f"All suspects: [{listed}]({listed})."


def _utterances(findings: Findings, rows: NDArray[np.int64], shown: Shown) -> TableData:
    header = ["set", "id", "s", "char/s", "z", *(["CER"] * bool(findings.recognised)), "text"]
    lines = []
    for found in (shown[int(row)] for row in rows):
        numbers = [f"{found.seconds:.1f}", f"{found.rate:.1f}", f"{found.z:+.1f}"]
        if findings.recognised:
            numbers.append("" if found.cer is None else f"{found.cer:.0f}")
        lines.append([found.where, found.id, *numbers, short(found.text)])
    return header, lines


def short(text: str) -> str:
    """The beginning of a text."""
    return text if len(text) <= TITLE_LENGTH else text[: TITLE_LENGTH - 1] + "…"


def _characters(findings: Findings) -> list[Part]:
    parts: list[Part] = []
    if findings.strangers:
        header = ["character", "", "in training", "dev, test", "left out", "for example"]
        lines = [
            [s.name, s.kind, f"{s.train:,}", f"{s.held_out:,}", f"{s.left_out:,}",
             ", ".join(s.examples)]
            for s in findings.strangers[:_LETTERS]
        ]  # fmt: skip
        parts.append(TablePart(header, lines, _FIRST))
        if len(findings.strangers) > _LETTERS:
            parts.append(Text(f"And {len(findings.strangers) - _LETTERS:,} more."))
    else:
        parts.append(Text(f"All are of the alphabet, and in {RARE} training utterances or more."))
    if findings.unseen:
        more = f" and {len(findings.unseen) - _LETTERS:,} more" * (len(findings.unseen) > _LETTERS)
        letters = " ".join(findings.unseen[:_LETTERS])
        parts.append(Text(f"In the alphabet and in no training text: {letters}{more}"))
    return parts


def _speakers(findings: Findings, shown: Shown) -> list[Part]:
    rows, seconds = findings.seconds_by_speaker()
    if not len(rows):
        return [Text("No training utterance has a speaker's name.")]
    total = findings.survey.seconds[findings.survey.rows_of("train")].sum(dtype=np.float64)
    lines = [
        [shown[int(row)].where.split()[0], shown[int(row)].speaker, f"{own / 60:,.1f}",
         f"{100 * own / total:.1f}"]
        for row, own in zip(findings.speakers, seconds, strict=False)
    ]  # fmt: skip
    text = f"{len(rows):,} in training; those with most speech:"
    return [Text(text), TablePart(["corpus", "speaker", "minutes", "% of training"], lines, _FIRST)]


def _twice(findings: Findings, shown: Shown) -> list[Part]:
    differing = len(findings.copies.differing)
    parts: list[Part] = [
        Text(
            f"Recordings of the same samples: {findings.copies.all.more:,} copies of "
            f"{findings.copies.all.groups:,}; {differing:,} recordings have a copy with another "
            f"text, and one of the two is wrong."
        )
    ]
    parts += _examples(findings.copies.all, shown)
    parts.append(
        Text(
            f"Training texts that come more than once: {findings.sentences.groups:,}, and "
            f"{findings.sentences.more:,} utterances repeat one; {findings.retakes.more:,} repeat "
            f"one by the same speaker. The most frequent:"
        )
    )
    return parts + _examples(findings.sentences, shown)


def _examples(groups: Groups, shown: Shown) -> list[Part]:
    lines = []
    for rows in groups.largest:
        first, second = (shown[int(row)] for row in rows[:2])
        names = f"{first.id}, {second.id}"
        same = "" if first.text == second.text else f" / {short(second.text)}"
        lines.append([f"{len(rows):,}", short(first.text) + same, names])
    return [TablePart(["times", "text", "the first two"], lines, _FIRST)] if lines else []


def _leaks(findings: Findings, shown: Shown) -> list[Part]:
    if not findings.leaks:
        return [Text("Nothing: no recording, id, sentence or speaker.")]
    lines = []
    for leak in findings.leaks:
        own, held = leak.pairs[0]
        lines.append(
            [
                leak.held_out.name,
                _LEAKS[leak.kind],
                f"{leak.of_held_out:,} ({leak.share:.1f} %)",
                f"{leak.train:,}",
                f"{shown[own].id} = {shown[held].id}",
            ]
        )
    header = ["held out", "training has", "of the set", "in training", "for example"]
    return [TablePart(header, lines)]


def _left_out(findings: Findings) -> list[Part]:
    reasons = findings.left_out.reasons.most_common()
    if not reasons:
        return [Text("Nothing.")]
    return [TablePart(["utterances", "reason"], [[f"{n:,}", reason] for reason, n in reasons])]


def _validated(findings: Findings) -> list[str]:
    survey = findings.survey
    return [
        f"{manifest.name}: {problems.checked:,} of {manifest.last - manifest.first:,} cuts looked "
        f"at, {problems.found:,} not accepted" + (f": {problems.first}" * bool(problems.found))
        for manifest, problems in zip(survey.manifests, survey.problems, strict=True)
    ]
