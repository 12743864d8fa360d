"""The kinds of corpus that `data.corpora` may name, each with its options."""

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field

from icetransfer.settings.section import Section, Split


class Minutes(Section):
    """How much synthetic speech to make for each split, in minutes."""

    train: float = Field(30, ge=0)
    """Minutes of training speech."""
    dev: float = Field(3, ge=0)
    """Minutes of dev speech."""
    test: float = Field(6, ge=0)
    """Minutes of test speech."""


class SyntheticCorpus(Section):
    """Speech made on this machine by espeak-ng."""

    kind: Literal["synthetic"]
    """Speech made on this machine by espeak-ng."""
    language: str | None = None
    """Language code; null: the recipe's language."""
    domain: Literal["slots", "open"] = "slots"
    """Sentences of a closed grammar, or of word lists."""
    minutes: Minutes = Minutes()
    seed: int = 1
    """Of the sentences, voices and noise."""


class FolderCorpus(Section):
    """Any folder with audio and a transcripts.tsv (path, text, speaker)."""

    kind: Literal["folder"]
    """A folder with audio and a transcripts.tsv (path, text, speaker)."""
    path: Path
    """The folder."""
    language: str | None = None
    """Language code; null: the recipe's language."""
    holdout_by: Literal["recording", "speaker"] = "recording"
    """What is held out together: each recording by itself, or all of a speaker's."""
    holdout_every: int = Field(10, ge=0)
    """One recording in N is test, another dev, by a hash of its name; 0: none is held out."""


class PublishedCorpus(Section):
    """A corpus that many study, in its publisher's layout."""

    path: Path | None = None
    """Where it lies; null: stage 0 fetches it to <data.dir>/corpus/<name>."""
    language: str | None = None
    """Language code; null: the recipe's language."""
    splits: tuple[Split, ...] = Field(("train", "dev", "test"), min_length=1)
    """The splits to use."""


class Fleurs(PublishedCorpus):
    """FLEURS: read sentences of Wikipedia, some 10 h a language."""

    kind: Literal["fleurs"]
    """FLEURS: read sentences of Wikipedia, some 10 h a language."""


class MultilingualLibriSpeech(PublishedCorpus):
    """Multilingual LibriSpeech: audio books."""

    kind: Literal["mls"]
    """Multilingual LibriSpeech: audio books."""
    codec: Literal["flac", "opus"] = "opus"
    """Which of the two published archives."""


class CommonVoice(PublishedCorpus):
    """Mozilla Common Voice, any release: sentences read by volunteers."""

    kind: Literal["common_voice"]
    """Mozilla Common Voice, any release: sentences read by volunteers."""
    train: Literal["train", "validated"] = "train"
    """The table to train on; validated: without dev, test and their speakers."""


class VoxPopuli(PublishedCorpus):
    """The transcribed part of VoxPopuli: speeches in the European Parliament."""

    kind: Literal["voxpopuli"]
    """The transcribed part of VoxPopuli: speeches in the European Parliament."""


class ManifestCorpus(Section):
    """A corpus that manifests describe, any number for each split."""

    language: str | None = None
    """Language code; null: the recipe's language."""
    train: tuple[Path, ...] = ()
    """Manifests of the training split."""
    dev: tuple[Path, ...] = ()
    """Manifests of the dev split."""
    test: tuple[Path, ...] = ()
    """Manifests of the test split."""

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that have a manifest."""
        return tuple(split for split in get_args(Split) if getattr(self, split))


class JsonLines(ManifestCorpus):
    """NeMo's manifests, JSON objects with audio_filepath, duration, text, a line each."""

    kind: Literal["jsonl"]
    """NeMo's manifests: a JSON object a line, with audio_filepath, duration and text."""


class Cuts(ManifestCorpus):
    """lhotse's manifests of cuts, or Shar folders."""

    kind: Literal["cuts"]
    """lhotse's manifests of cuts, or Shar folders."""


CORPUS_CLASSES = (
    SyntheticCorpus,
    FolderCorpus,
    Fleurs,
    MultilingualLibriSpeech,
    CommonVoice,
    VoxPopuli,
    JsonLines,
    Cuts,
)
AnyCorpus = (
    SyntheticCorpus
    | FolderCorpus
    | Fleurs
    | MultilingualLibriSpeech
    | CommonVoice
    | VoxPopuli
    | JsonLines
    | Cuts
)
Corpus = Annotated[AnyCorpus, Field(discriminator="kind")]


def has_split(corpus: AnyCorpus, split: str) -> bool:
    """Whether the config uses this split of a corpus."""
    if isinstance(corpus, PublishedCorpus | ManifestCorpus):
        return split in corpus.splits
    return True


def must_hold(corpus: AnyCorpus, split: str) -> bool:
    """Whether a corpus without a recording for dev or test is a mistake: the config asks for it."""
    if split == "train":
        return False
    if isinstance(corpus, FolderCorpus):
        return corpus.holdout_every >= (2 if split == "dev" else 1)
    if isinstance(corpus, SyntheticCorpus):
        return float(getattr(corpus.minutes, split)) > 0
    return has_split(corpus, split)
