"""Stage 0: make the corpora that this machine can make; name those that a person must bring.

Synthetic corpora are spoken by espeak-ng into `<data.dir>/corpus/<name>`; a `folder` corpus lies
where its owner keeps it and is only looked for.
"""

import os
from pathlib import Path

from icetransfer import config, experiment
from icetransfer.data import synthetic


def corpus_dir(data: config.Data, name: str) -> Path:
    """Where a corpus's audio and transcripts lie.

    Args:
        data: the config's data section.
        name: the corpus's name in it.
    """
    corpus = data.corpora[name]
    if isinstance(corpus, config.FolderCorpus):
        return corpus.path
    return data.dir / "corpus" / name


def download(exp: experiment.Experiment) -> None:
    """Makes or finds every corpus of the config.

    Raises:
        ValueError: a folder corpus is not where the config says.
    """
    for name, corpus in exp.config.data.corpora.items():
        folder = corpus_dir(exp.config.data, name)
        if isinstance(corpus, config.FolderCorpus):
            if not (folder / "transcripts.tsv").is_file():
                raise ValueError(
                    f"corpus {name}: {folder / 'transcripts.tsv'} does not exist; set "
                    f"data.corpora.{name}.path to a folder with audio and a transcripts.tsv "
                    f"(path, text, speaker; tab-separated)"
                )
            experiment.log.info("corpus %s: %s", name, folder)
            continue
        synthetic.synthesise(
            corpus.language or exp.config.language,
            corpus.domain,
            corpus.minutes.model_dump(),
            folder,
            seed=corpus.seed,
            jobs=os.cpu_count() or 1,
        )
        experiment.log.info("corpus %s: synthetic speech in %s", name, folder)


if __name__ == "__main__":
    experiment.run_stage(__doc__, download)
