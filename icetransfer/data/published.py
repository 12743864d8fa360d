"""Which published corpora there are in which language, under which name, and where they come from.

The one table of it: the readers, stage 0 and the recipes' README follow it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A published corpus.

    Attributes:
        title: Its name for people.
        licence: What its publisher says.
        site: Where its files are, or, where no program may fetch them, its page.
        names: The publisher's name of each of the recipes' languages that it has.
        absent: Why it has not the others.
    """

    title: str
    licence: str
    site: str
    names: Mapping[str, str]
    absent: Mapping[str, str]


PUBLISHED: Mapping[str, Published] = {
    "fleurs": Published(
        title="FLEURS",
        licence="CC BY 4.0",
        site="https://huggingface.co/datasets/google/fleurs/resolve/main/data",
        names={
            "de": "de_de", "en": "en_us", "es": "es_419", "fr": "fr_fr", "it": "it_it",
            "nl": "nl_nl", "pl": "pl_pl", "pt": "pt_br", "ro": "ro_ro",
        },
        absent={},
    ),
    "mls": Published(
        title="Multilingual LibriSpeech",
        licence="CC BY 4.0",
        site="https://dl.fbaipublicfiles.com/mls",
        names={
            "de": "german", "en": "english", "es": "spanish", "fr": "french", "it": "italian",
            "nl": "dutch", "pl": "polish", "pt": "portuguese",
        },
        absent={"ro": "LibriVox's audio books, in eight languages, none of them Romanian"},
    ),
    "common_voice": Published(
        title="Common Voice",
        licence="CC0",
        site="https://datacollective.mozillafoundation.org",
        names={code: code for code in ("de", "en", "es", "fr", "it", "nl", "pl", "pt", "ro")},
        absent={},
    ),
    "voxpopuli": Published(
        title="VoxPopuli",
        licence="CC0",
        site="https://huggingface.co/datasets/facebook/voxpopuli/resolve/main/data",
        names={code: code for code in ("de", "en", "es", "fr", "it", "nl", "pl", "ro")},
        absent={"pt": "its Portuguese recordings have no transcripts"},
    ),
}  # fmt: skip


def name_of(kind: str, language: str) -> str:
    """The publisher's name of a language.

    Args:
        kind: A key of `PUBLISHED`.
        language: Code of a language.

    Raises:
        ValueError: The corpus has not this language.
    """
    corpus = PUBLISHED[kind]
    if language not in corpus.names:
        reason = corpus.absent.get(
            language, f"of the recipes' languages it has {', '.join(corpus.names)}"
        )
        raise ValueError(
            f"{corpus.title} has no transcribed {language!r}: {reason}; take it out of data.corpora"
        )
    return corpus.names[language]
