"""Stage 0: make the corpora that this machine can make, fetch those that a program may fetch.

Synthetic corpora are spoken by espeak-ng into `<data.dir>/corpus/<name>`, published ones fetched
there unless the config says where they lie.  What a person must bring is named, with where from
and where to.  A run that was interrupted goes on where it stopped.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from icetransfer import config, experiment
from icetransfer.data.fetch import fetch, fetch_archive, unpack
from icetransfer.data.published import PUBLISHED, name_of
from icetransfer.data.readers.common_voice import language_folder
from icetransfer.data.readers.mls import archive_name
from icetransfer.data.synthetic import speech
from icetransfer.data.utterances import SPLITS
from icetransfer.settings import corpora as kinds
from icetransfer.stage.json_file import read_json


def corpus_dir(data: config.Data, name: str) -> Path:
    """Where a corpus's audio and transcripts lie.

    Args:
        data: the config's data section.
        name: the corpus's name in it.
    """
    corpus = data.corpora[name]
    if isinstance(corpus, kinds.FolderCorpus | kinds.PublishedCorpus) and corpus.path:
        return corpus.path
    return data.dir / "corpus" / name


def download(exp: experiment.Experiment) -> None:
    """Makes, fetches or finds every corpus of the config.

    Raises:
        ValueError: a corpus is not where the config says, cannot be fetched, must be brought by
            hand, or does not exist in the language.
    """
    data = exp.config.data
    places = {
        name: (corpus, corpus_dir(data, name), corpus.language or exp.config.language)
        for name, corpus in data.corpora.items()
    }
    for name, place in places.items():  # what is missing is said before hours of fetching
        _find(name, *place)
    for name, (corpus, folder, language) in places.items():
        _make(corpus, folder, language)
        experiment.log.info("corpus %s: %s", name, folder)


def _find(name: str, corpus: kinds.AnyCorpus, folder: Path, language: str) -> None:
    """Looks for what a person must have brought.

    Raises:
        ValueError: it is not there, or the corpus does not exist in the language.
    """
    if isinstance(corpus, kinds.FolderCorpus):
        _find_folder(name, folder)
    elif isinstance(corpus, kinds.JsonLines | kinds.Cuts):
        _find_manifests(name, corpus)
    elif isinstance(corpus, kinds.CommonVoice) and not corpus.path:
        find_common_voice(name, folder, language)
    elif not isinstance(corpus, kinds.SyntheticCorpus):
        name_of(corpus.kind, language)
        if corpus.path and not corpus.path.is_dir():
            raise ValueError(
                f"corpus {name}: the folder {corpus.path} does not exist; set "
                f"data.corpora.{name}.path to where {PUBLISHED[corpus.kind].title} is unpacked"
            )


def _make(corpus: kinds.AnyCorpus, folder: Path, language: str) -> None:
    """Makes or fetches a corpus, if it is one that programs may."""
    if isinstance(corpus, kinds.SyntheticCorpus):
        speech.synthesise(
            language,
            corpus.domain,
            corpus.minutes.model_dump(),
            folder,
            seed=corpus.seed,
            jobs=os.cpu_count() or 1,
        )
    elif isinstance(corpus, kinds.PublishedCorpus) and corpus.path:
        return
    elif isinstance(corpus, kinds.MultilingualLibriSpeech):
        fetch_mls(folder, language, corpus.codec)
    elif isinstance(corpus, kinds.Fleurs):
        fetch_fleurs(folder, language, corpus.splits)
    elif isinstance(corpus, kinds.VoxPopuli):
        fetch_voxpopuli(folder, language, corpus.splits)


def _find_folder(name: str, folder: Path) -> None:
    if not (folder / "transcripts.tsv").is_file():
        raise ValueError(
            f"corpus {name}: {folder / 'transcripts.tsv'} does not exist; set "
            f"data.corpora.{name}.path to a folder with audio and a transcripts.tsv "
            f"(path, text, speaker; tab-separated)"
        )


def _find_manifests(name: str, corpus: kinds.ManifestCorpus) -> None:
    given = [path for split in SPLITS for path in getattr(corpus, split)]
    missing = [str(path) for path in given if not path.exists()]
    if not given or missing:
        what = f"{', '.join(missing)} does not exist" if missing else "names no file"
        raise ValueError(
            f"corpus {name}: {what}; set data.corpora.{name}.train, dev and test to lists of paths"
        )


def fetch_fleurs(folder: Path, language: str, splits: Sequence[str]) -> None:
    """Fetches a language of FLEURS: a table and an archive for each split."""
    locale = name_of("fleurs", language)
    site = f"{PUBLISHED['fleurs'].site}/{locale}"
    for split in splits:
        fetch(f"{site}/{split}.tsv", folder / locale / f"{split}.tsv")
        fetch_archive(f"{site}/audio/{split}.tar.gz", folder / locale / "audio")


def fetch_mls(folder: Path, language: str, codec: str) -> None:
    """Fetches a language of Multilingual LibriSpeech, one archive with a published checksum.

    Raises:
        ValueError: the list of checksums lacks the archive.
    """
    archive = archive_name(language, codec) + ".tar.gz"
    site = PUBLISHED["mls"].site
    sums = folder / "md5sum.txt"
    fetch(f"{site}/md5sum.txt", sums)
    lines = [line.split() for line in sums.read_text(encoding="utf-8").splitlines()]
    published = {Path(line[-1]).name: line[0] for line in lines if len(line) == 2}
    if archive not in published:
        raise ValueError(f"{sums} has no {archive}: remove it and run the stage again")
    fetch_archive(f"{site}/{archive}", folder, published[archive])


def fetch_voxpopuli(folder: Path, language: str, splits: Sequence[str]) -> None:
    """Fetches the transcribed part of a language of VoxPopuli, in the publisher's archives.

    Raises:
        ValueError: the publisher's list of archives lacks the language.
    """
    language = name_of("voxpopuli", language)
    site = PUBLISHED["voxpopuli"].site
    counts = folder / "n_files.json"
    fetch(f"{site}/n_files.json", counts)
    archives = read_json(counts)
    if language not in archives:
        raise ValueError(f"{counts} has no {language!r}: remove it and run the stage again")
    for split in splits:
        fetch(f"{site}/{language}/asr_{split}.tsv", folder / language / f"asr_{split}.tsv")
        for number in range(archives[language][split]):
            url = f"{site}/{language}/{split}/{split}_part_{number}.tar.gz"
            fetch_archive(url, folder / language / split)


def find_common_voice(name: str, folder: Path, language: str) -> None:
    """Finds Common Voice, which a person must fetch; unpacks the archive if it is there.

    Raises:
        ValueError: neither is there: says what to fetch, from where, and where to put it.
    """
    language = name_of("common_voice", language)
    try:
        language_folder(folder, language)
        return
    except ValueError:
        archives = sorted(folder.glob("*.tar.gz"))
    if not archives:
        raise ValueError(
            f"corpus {name}: Common Voice is given to people, not to programs.\n"
            f"  1. Open {PUBLISHED['common_voice'].site}, sign in, and find "
            f"Common Voice Scripted Speech, language {language!r}, any release.\n"
            f"  2. Accept its terms and download the .tar.gz (cv-corpus-...-{language}.tar.gz).\n"
            f"  3. Put it, packed, into {folder.absolute()} and run this stage again.\n"
            f"If you have it unpacked already, set data.corpora.{name}.path to the folder that "
            f"holds {language}/clips."
        )
    for archive in archives:
        unpack(archive, folder)
    language_folder(folder, language)


if __name__ == "__main__":
    experiment.run_stage(__doc__, download)
