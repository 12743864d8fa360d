"""The LSTM language model: its likelihood, a run that goes on, the stage."""

import json
import math
import os
import shutil
import signal

import pytest
import torch

from icetransfer import language_model as stage
from icetransfer.experiment import RUN_AGAIN
from icetransfer.model.language_model import BOUNDARY_ID, LanguageModel, build_language_model
from icetransfer.settings.language_model import LanguageModel as Settings
from icetransfer.training import language_model
from icetransfer.training.language_model import batches, perplexity, train_language_model

SETTINGS = Settings(
    text="transcripts", channels=16, max_epochs=4, batch_tokens=60, learning_rate=0.03
)


def sentences(count: int, seed: int) -> list[torch.Tensor]:
    """Runs of tokens that go up by one, from 3 to 9 and round again."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(0, 7, (count, 2), generator=generator).tolist()
    return [3 + (first + torch.arange(length + 1)) % 7 for first, length in draws]


def test_likelihood_is_that_of_the_tokens_and_the_end_one_by_one() -> None:
    torch.manual_seed(1)
    model = LanguageModel(10, 8, 2).eval()
    given = sentences(5, 1)
    total = 0.0
    for sentence in given:
        state, last = model.initial_state(1), BOUNDARY_ID
        for token in [*sentence.tolist(), BOUNDARY_ID]:
            log_probs, state = model(torch.tensor([[last]]), state)
            total -= float(log_probs[0, 0, token].detach())
            last = token
    count = sum(len(sentence) + 1 for sentence in given)
    assert math.log(perplexity(model, given)) == pytest.approx(total / count, rel=1e-5)


def test_batches_hold_every_sentence_once_and_no_more_than_they_may() -> None:
    given = sentences(50, 2)
    for seed in (None, 3):
        found = [*batches(given, 40, seed)]
        assert all(len(lens) * (int(lens.max()) + 1) <= 40 for _, lens in found)
        rows = [row[:n].tolist() for rows, lens in found for row, n in zip(rows, lens, strict=True)]
        assert sorted(rows) == sorted(sentence.tolist() for sentence in given)


def test_it_learns_and_a_stopped_run_ends_as_the_undisturbed_one(tmp_path, monkeypatch) -> None:
    text, dev = sentences(80, 3), sentences(20, 4)
    whole = train_language_model(text, dev, 10, SETTINGS, 1, tmp_path / "whole.pt")
    assert perplexity(whole, dev) < 0.6 * perplexity(LanguageModel(10, 16, 1), dev)
    judge = language_model._judge

    def judge_and_stop(run, dev) -> None:
        judge(run, dev)
        if run.epoch == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(language_model, "_judge", judge_and_stop)
    with pytest.raises(SystemExit) as stopped:
        train_language_model(text, dev, 10, SETTINGS, 1, tmp_path / "parts.pt")
    assert stopped.value.code == RUN_AGAIN
    monkeypatch.setattr(language_model, "_judge", judge)
    parts = train_language_model(text, dev, 10, SETTINGS, 1, tmp_path / "parts.pt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name


def test_the_best_pass_is_kept(tmp_path, monkeypatch) -> None:
    """One sentence learned by heart makes the others less likely."""
    settings = SETTINGS.model_copy(update={"max_epochs": 60, "learning_rate": 0.05})
    text, dev = sentences(1, 5), sentences(20, 6)
    model = train_language_model(text, dev, 10, settings, 1, tmp_path / "run.pt")
    content = torch.load(tmp_path / "run.pt", weights_only=True)
    assert content["epoch"] < 60
    assert perplexity(model, dev) == pytest.approx(min(content["perplexities"]), rel=1e-5)
    assert content["rate"] < 0.05 and content["perplexities"][-1] > min(content["perplexities"])


def test_the_stage(tone_recipe, caplog) -> None:
    caplog.set_level("INFO", logger="icetransfer")
    small = "language_model={text: transcripts, channels: 16, max_epochs: 3}"
    experiment = tone_recipe("language_model", small)
    stage.make_language_model(experiment)
    folder = experiment.language_model_dir
    found = json.loads((folder / "language_model.json").read_text())
    assert 1 < found["dev_perplexity"] < found["dev_word_perplexity"]
    assert found["sentences"] == len((folder / "text.txt").read_text().splitlines())
    model = build_language_model(torch.load(folder / "lstm.pt", weights_only=True))
    assert sum(p.numel() for p in model.parameters()) == found["parameters"]
    assert "language_model" in json.loads((experiment.dir / "provenance.json").read_text())
    before = (folder / "lstm.pt").stat().st_mtime_ns
    stage.make_language_model(experiment)
    assert (folder / "lstm.pt").stat().st_mtime_ns == before
    assert f"skip: {folder / 'lstm.pt'} is complete" in caplog.text
    experiment = tone_recipe("language_model", small.replace("max_epochs: 3", "max_epochs: 1"))
    folder = shutil.copytree(folder, experiment.language_model_dir)
    stage.make_language_model(experiment)  # of another setting: made again
    assert (folder / "lstm.pt").stat().st_mtime_ns > before
    assert sorted(path.name for path in folder.iterdir()) == [
        *("language_model.json", "lstm.onnx", "lstm.pt", "stamp.json"),
        *("text.json", "text.stamp.json", "text.txt"),
    ]


def test_nothing_is_made_unless_it_is_asked_for(tone_recipe, caplog) -> None:
    caplog.set_level("INFO", logger="icetransfer")
    experiment = tone_recipe("no_language_model")
    stage.make_language_model(experiment)
    assert "skip: language_model.text=none" in caplog.text
    assert not experiment.language_model_dir.exists()
