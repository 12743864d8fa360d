"""Trains the LSTM language model; a run that was stopped and goes on equals the undisturbed one.

After each pass over the text there is a checkpoint with the model, the best one so far, the
optimiser and the rate; the batches of a pass follow from the seed and its number.  The rate is
halved when dev perplexity has not fallen, and after `PATIENCE` halvings in a row training ends.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from icetransfer.data.jsonl import read_jsonl_gz
from icetransfer.data.language_text import collect_text
from icetransfer.data.tokenizer import Tokenizer
from icetransfer.experiment import (
    RUN_AGAIN,
    Experiment,
    log,
    seed_everything,
    write_provenance,
)
from icetransfer.model.language_model import LanguageModel
from icetransfer.onnx.language_model import export_language_model
from icetransfer.settings.corpora import has_split
from icetransfer.settings.language_model import LanguageModel as Settings
from icetransfer.stage import atomic
from icetransfer.stage.stamp import Stamp, digests
from icetransfer.training.faults import StopSignals

PATIENCE = 3
CLIP = 1.0  # of the gradient's norm

Sentences = Sequence[Tensor]  # int64 tokens of each


@dataclass
class Training:
    """What changes from pass to pass.

    Attributes:
        model: in training.
        optimizer: of its parameters.
        rate: Adam's.
        epoch: passes done.
        waited: passes since the best one.
        best: the weights with the lowest dev perplexity.
        perplexities: of dev, after each pass.
    """

    model: LanguageModel
    optimizer: torch.optim.Adam
    rate: float
    epoch: int = 0
    waited: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    perplexities: list[float] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Writes all of it, whole or not at all."""
        names = ("rate", "epoch", "waited", "best", "perplexities")
        content = {name: getattr(self, name) for name in names}
        content |= {"sizes": self.model.sizes, "model": self.model.state_dict()}
        content["optimizer"] = self.optimizer.state_dict()
        with atomic.atomic_path(path) as temporary:
            torch.save(content, temporary)

    def restore(self, content: dict[str, Any]) -> None:
        """Goes on from what `save` has written."""
        self.model.load_state_dict(content.pop("model"))
        self.optimizer.load_state_dict(content.pop("optimizer"))
        del content["sizes"]
        for name, value in content.items():
            setattr(self, name, value)


def batches(sentences: Sentences, most: int, seed: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Padded sentences (N, L) of similar lengths, and their lengths.

    Args:
        sentences: all of them.
        most: padded tokens of a batch.
        seed: of the order; None for the shortest first.
    """
    order = sorted(range(len(sentences)), key=lambda number: len(sentences[number]))
    groups: list[list[int]] = [[]]
    for number in order:
        if groups[-1] and (len(groups[-1]) + 1) * (len(sentences[number]) + 1) > most:
            groups.append([])
        groups[-1].append(number)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        groups = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
    for group in groups:
        chosen = [sentences[number] for number in group]
        lens = torch.tensor([len(sentence) for sentence in chosen])
        yield pad_sequence(chosen, batch_first=True), lens


@torch.inference_mode()
def perplexity(model: LanguageModel, sentences: Sentences, most: int = 20_000) -> float:
    """By token, ends of sentences included."""
    model.eval()
    loss = sum(
        float(model.negative_log_likelihood(*batch)) for batch in batches(sentences, most, None)
    )
    return math.exp(loss / sum(len(sentence) + 1 for sentence in sentences))


def train_language_model(
    text: Sentences, dev: Sentences, vocab_size: int, settings: Settings, seed: int, path: Path
) -> LanguageModel:
    """Trains, or goes on from the checkpoint at `path`.

    Args:
        text: to train on.
        dev: by whose perplexity the rate and the end are chosen.
        vocab_size: of the tokens.
        settings: of the config.
        seed: of the first weights, the order and the dropout.
        path: of the checkpoint, which stays when training is over.

    Returns:
        The model with the lowest dev perplexity, in evaluation mode.

    Raises:
        SystemExit: stopped by a signal with all saved, with RUN_AGAIN.
    """
    run = _begin(vocab_size, settings, seed, path)
    with StopSignals() as signals:
        while run.epoch < settings.max_epochs and run.waited < PATIENCE:
            began = time.monotonic()
            _train_epoch(run, text, settings, seed)
            _judge(run, dev)
            run.save(path)
            log.info(
                "language model, pass %d: dev perplexity %.2f, rate %.5f, %.1f s",
                run.epoch, run.perplexities[-1], run.rate, time.monotonic() - began,
            )  # fmt: skip
            if signals.received is not None:
                log.warning(
                    "%s: stopped with all saved in %s; the same command goes on from there "
                    "(exit code %d)", signals.received.name, path, RUN_AGAIN,
                )  # fmt: skip
                sys.exit(RUN_AGAIN)
    run.model.load_state_dict(run.best)
    return run.model.eval()


def _begin(vocab_size: int, settings: Settings, seed: int, path: Path) -> Training:
    seed_everything(seed)
    model = LanguageModel(vocab_size, settings.channels, settings.layers, settings.dropout)
    optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate)
    run = Training(model, optimizer, settings.learning_rate)
    if path.is_file():
        run.restore(torch.load(path, weights_only=True))
        log.info("language model: going on after pass %d of %s", run.epoch, path)
    return run


def _train_epoch(run: Training, text: Sentences, settings: Settings, seed: int) -> None:
    run.model.train()
    for group in run.optimizer.param_groups:
        group["lr"] = run.rate
    pass_seed = seed * 100_003 + run.epoch
    torch.manual_seed(pass_seed)  # of the dropout
    for sentences, lens in batches(text, settings.batch_tokens, pass_seed):
        loss = run.model.negative_log_likelihood(sentences, lens) / (lens.sum() + len(lens))
        run.optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), CLIP)
        run.optimizer.step()
    run.epoch += 1


def _judge(run: Training, dev: Sentences) -> None:
    found = perplexity(run.model, dev)
    if found < min(run.perplexities, default=math.inf):
        run.best, run.waited = copy.deepcopy(run.model.state_dict()), 0
    else:
        run.rate, run.waited = run.rate / 2, run.waited + 1
    run.perplexities.append(found)


def dev_texts(experiment: Experiment) -> list[str]:
    """The transcripts of the dev splits.

    Raises:
        ValueError: there is none.
    """
    texts = []
    for corpus, settings in experiment.config.data.corpora.items():
        if has_split(settings, "dev"):
            cuts = read_jsonl_gz(experiment.manifests_dir / f"{corpus}_dev.jsonl.gz")
            texts += [s["text"] for cut in cuts for s in cut["supervisions"] if s.get("text")]
    if not texts:
        raise ValueError(
            "a language model needs a dev split, by which its training ends: no corpus of "
            "data.corpora has one with text"
        )
    return texts


def text_digest(texts: Iterable[str]) -> str:
    """What identifies texts, as a stamp holds it."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def tokens_of(tokenizer: Tokenizer, texts: Iterable[str]) -> list[Tensor]:
    """The tokens of each text."""
    return [torch.tensor(tokenizer.encode(text)) for text in texts]


def make(experiment: Experiment) -> None:
    """Trains the model that the config asks for, unless it is there.

    Raises:
        ValueError: text is missing or is not what it should be, or there is no dev text.
    """
    config = experiment.config
    torch.set_num_threads(1)
    folder, target = experiment.language_model_dir, experiment.language_model
    exported, described = target.with_suffix(".onnx"), folder / "language_model.json"
    dev = dev_texts(experiment)
    path = collect_text(experiment)
    bpe_model = experiment.lang_dir / "bpe.model"
    settings = config.language_model.model_dump(mode="json")
    inputs = digests([path, bpe_model]) | {"dev": text_digest(dev), "seed": str(config.seed)}
    stamp = Stamp(folder / "stamp.json", inputs | {k: str(v) for k, v in settings.items()})
    checkpoint = folder / "training.pt"
    if stamp.is_current(target, exported, described):
        log.info("skip: %s is complete", target)
        return
    if stamp.changed() or not stamp.path.is_file():
        checkpoint.unlink(missing_ok=True)
    stamp.renew(target, exported, described)
    tokenizer = Tokenizer(bpe_model)
    began = time.monotonic()
    text = tokens_of(tokenizer, path.read_text(encoding="utf-8").splitlines())
    dev_tokens = tokens_of(tokenizer, dev)
    model = train_language_model(
        text, dev_tokens, tokenizer.vocab_size, config.language_model, config.seed, checkpoint
    )
    by_token = perplexity(model, dev_tokens)
    counts = [sum(map(len, dev_tokens)) + len(dev), sum(len(t.split()) for t in dev) + len(dev)]
    found = {
        "sentences": len(text),
        "tokens": sum(map(len, text)),
        "dev_perplexity": by_token,
        "dev_word_perplexity": math.exp(math.log(by_token) * counts[0] / counts[1]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.monotonic() - began, 1),
    }
    with atomic.atomic_path(target) as temporary:
        torch.save({"sizes": model.sizes, "model": model.state_dict()}, temporary)
    export_language_model(model, exported)
    atomic.write_text(described, json.dumps(found, indent=1) + "\n")
    checkpoint.unlink(missing_ok=True)
    write_provenance(experiment, "language_model", **found)
    log.info(
        "%d sentences, %d tokens; dev perplexity %.2f by token, %.1f by word -> %s",
        found["sentences"], found["tokens"], by_token, found["dev_word_perplexity"], target,
    )  # fmt: skip
