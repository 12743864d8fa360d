import dataclasses
import json

import pytest
import torch

from icetransfer import train
from icetransfer.config import load_config
from icetransfer.data.jsonl import read_jsonl_gz
from icetransfer.experiment import open_experiment
from icetransfer.model.checkpoint import read_checkpoint
from icetransfer.training import preflight, resume, scheme

OPEN = (
    *("train.max_steps=null", "train.batch_seconds=null", "train.checkpoint_every=null"),
    "train.valid_every=null",
)


def decide(hours, *overrides, processes=1):
    corpora = "data.corpora={a: {kind: folder, path: unused}}"
    config = load_config([], ["language=nl", corpora, *overrides])
    return scheme.decide(config, 3600 * hours, processes)


def values(hours, *overrides, processes=1):
    return decide(hours, *overrides, processes=processes).values


@pytest.mark.parametrize("hours", [2 / 60, 0.5, 10, 100, 1000, 2500])
def test_the_length_grows_with_the_hours_and_passes_fall(hours):
    less, more = values(hours), values(2 * hours)
    seen, twice = (v["max_steps"] * v["batch_seconds"] / 3600 for v in (less, more))
    assert seen <= twice <= 2 * seen * 1.01
    assert more["batch_seconds"] >= less["batch_seconds"]
    assert seen / hours <= 20.1 or less["max_steps"] == scheme.LEAST_STEPS


def test_what_the_amounts_of_the_study_get():
    short, paper, most = values(2 / 60), values(100), values(2500)
    assert (short["batch_seconds"], short["max_steps"]) == (16, scheme.LEAST_STEPS)
    assert (paper["batch_seconds"], paper["max_steps"]) == (400, 18_000)
    assert (most["batch_seconds"], most["max_steps"]) == (400, 90_000)
    assert paper["lr_scale"]["encoder"] == 0.3 and paper["lr_scale"]["joiner"] == 1


def test_a_short_run_moves_what_is_new_faster():
    fast = [values(1, f"train.max_steps={n}")["lr_scale"] for n in (100, 420, 1250, 5000)]
    assert [scales["joiner"] for scales in fast] == [6, 5.95, 2, 1]
    assert all(scales["encoder"] == 0.3 and scales["decoder"] == 1 for scales in fast[:2])


def test_a_decoder_that_sees_its_sentences_too_often_is_slowed():
    rates = [values(h, "train.max_steps=420")["lr_scale"]["decoder"] for h in (2 / 60, 8 / 60, 0.5)]
    assert rates == [0.1, 1, 1]  # 56, 14 and 4 passes


def test_what_is_new_is_fast_on_little_text_however_many_steps():
    rates = [
        values(2 / 60, f"train.max_steps={n}")["lr_scale"]["joiner"] for n in (100, 1500, 9000)
    ]
    assert rates == [6, 6, 6]
    assert values(0.5, "train.max_steps=2500")["lr_scale"]["joiner"] == 1  # 22 passes


def test_what_was_loaded_waits():
    waits = [values(1, f"train.max_steps={n}")["freeze"] for n in (100, 420, 2500, 90_000)]
    assert [frozen["encoder"] for frozen in waits] == [20, 84, 500, 500]
    assert all(set(frozen) == {"encoder_embed", "encoder"} for frozen in waits)
    assert "freeze" not in values(1, "transfer.adapters.rank=4")
    assert "freeze" not in values(1, "init=random")


def test_the_parts_that_the_config_names_have_its_numbers():
    words = ["language=nl", "data.corpora={a: {kind: folder, path: unused}}"]
    words += ["train.lr_scale={encoder: 0.5, encoder.encoders.0: 0.7}", "train.freeze={encoder: 0}"]
    config = load_config([], words)
    decided = scheme.decide(config, 3600)
    assert decided.values["lr_scale"]["encoder"] == 0.5, "what is printed is what is done"
    assert decided.values["freeze"]["encoder"] == 0
    settled = scheme.merge(config, decided.values).train
    assert settled.lr_scale["encoder"] == 0.5 and settled.lr_scale["encoder.encoders.0"] == 0.7
    assert settled.lr_scale["encoder_embed"] == 0.3
    assert settled.freeze["encoder"] == 0 < settled.freeze["encoder_embed"]


def test_what_the_config_says_is_kept():
    found = values(
        1, "train.max_steps=300", "train.batch_seconds=50", "train.loss_warmup_steps=7",
        "train.schedule.warmup_steps=8", "train.valid_every=9", "train.checkpoint_every=10",
        "train.lr_scale={encoder: 0.5, encoder.encoders.0: 0.7}",
    )  # fmt: skip
    assert set(found) == {"lr_scale", "freeze"}


def test_epochs_count_every_speed_and_every_process():
    one = values(10, "train.epochs=3", "train.batch_seconds=100")["max_steps"]
    assert one == round(3 * (1 / 0.9 + 1 + 1 / 1.1) * 36000 / 100)
    assert values(10, "train.epochs=3", "train.batch_seconds=100", processes=4)[
        "max_steps"
    ] == pytest.approx(one / 4, abs=1)
    with pytest.raises(ValueError, match="epochs and max_steps both"):
        decide(1, "train.epochs=3", "train.max_steps=5")


def test_other_starts_have_other_rates():
    assert "lr_scale" not in values(1, "init=random")
    kept = values(1, "transfer.parts=[encoder_embed, encoder, decoder, joiner]")["lr_scale"]
    assert kept["decoder"] == kept["joiner"] == 0.3 and kept["simple_am_proj"] >= 1
    assert "ctc_output" not in values(1, "transfer.ctc=false")["lr_scale"]
    assert values(1, "transfer.adapters.rank=4")["lr_scale"]["encoder"] == 1


def test_a_run_says_what_it_decided_and_goes_on_as_it_began(prepare, caplog, monkeypatch):
    monkeypatch.setattr(scheme, "LEAST_STEPS", 6)
    monkeypatch.setattr(scheme, "PASSES", 0.1)
    experiment = prepare("decided", *OPEN)
    with pytest.raises(ValueError, match=r"scheme\.json does not exist: run stage 6"):
        _ = experiment.final_step
    with caplog.at_level("INFO", logger="icetransfer"):
        train.train(experiment)
    assert "train.max_steps=6: the smallest useful number" in caplog.text
    assert "train.batch_seconds=16: a 500th of the " in caplog.text
    assert "preflight: the longest and the fullest recording" in caplog.text
    assert experiment.final_step == 6 and resume.saved_steps(experiment)[-1] == 6
    monkeypatch.setattr(scheme, "LEAST_STEPS", 9)
    again = scheme.settle(open_experiment(experiment.dir))
    assert again.final_step == 6 and again.config.train.max_steps == 6


def test_the_largest_batches_are_tried_and_leave_no_trace(prepare, monkeypatch):
    tried = []
    inner = train.forward_backward

    def spy(run, shares, tier):
        tried.append((tuple(shares[0].features.shape), tuple(shares[0].tokens.shape), tier))
        return inner(run, shares, tier)

    experiment = prepare("tried")
    run = resume.start_run(experiment, None)
    index = json.loads((experiment.dir / "train_data" / "index.json").read_text())
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    assert preflight.preflight(run, spy) == ""
    assert len(tried) == 2 * 4
    (frames, tokens), fullest = index["longest"], index["fullest"]
    rows = int(8 / (frames / 100))
    assert tried[0] == ((rows, frames, 80), (rows, tokens), (8, -1))
    assert tried[4][0][1] == fullest[0] and tried[3][2] == tried[7][2] == (-1, -1)
    assert all(p.grad is None for p in run.model.parameters())
    assert all(before[name].equal(value) for name, value in run.model.state_dict().items())
    lengths = [block["features"]["num_frames"] for block in read_blocks(experiment)]
    assert frames == max(lengths)


def read_blocks(experiment):
    for path in (experiment.dir / "train_data").glob("block-*.jsonl.gz"):
        yield from read_jsonl_gz(path)


class Limit:
    """Memory that holds so many seconds of a batch."""

    def __init__(self, monkeypatch, seconds):
        self.inner, self.seconds = train.compute_losses, seconds
        monkeypatch.setattr(train, "compute_losses", self)

    def __call__(self, run, batch, features, *tier):
        if batch.features.size(0) * batch.features.size(1) > 100 * self.seconds:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.inner(run, batch, features, *tier)


def settled_after_preflight(experiment):
    preflight.decide_and_try(experiment, train.forward_backward, 1, is_begun=False)
    return scheme.settle(experiment)


def test_an_open_batch_is_halved_until_it_fits(prepare, monkeypatch, caplog):
    Limit(monkeypatch, 5)
    experiment = prepare("halved", *OPEN)
    with caplog.at_level("INFO", logger="icetransfer"):
        settled = settled_after_preflight(experiment)
    assert settled.config.train.batch_seconds == 4
    assert "do not fit into the memory" in caplog.text and "trying 8 s" in caplog.text
    assert "the most that the memory holds, by halves" in caplog.text
    assert settled.config.train.max_steps == scheme.LEAST_STEPS


def test_a_given_batch_that_does_not_fit_is_warned_of(prepare, monkeypatch, caplog):
    Limit(monkeypatch, 5)
    experiment = prepare("given", "train.batch_seconds=8")
    with caplog.at_level("WARNING", logger="icetransfer"):
        settled = settled_after_preflight(experiment)
    assert settled.config.train.batch_seconds == 8
    assert "computed in pieces" in caplog.text


def test_a_recording_that_fits_nowhere_ends_it_before_the_first_step(prepare, monkeypatch):
    Limit(monkeypatch, 0.5)
    experiment = prepare("nowhere", *OPEN)
    with pytest.raises(ValueError, match=r"1 recordings of .* lower data\.max_seconds"):
        train.train(experiment)
    assert not experiment.scheme_path.exists()


def test_a_disk_without_room_for_the_checkpoints_ends_it_too(prepare, monkeypatch):
    experiment = prepare("full")
    usage = dataclasses.make_dataclass("Usage", ["total", "used", "free"])
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage(10, 9, 1000))
    with pytest.raises(ValueError, match=r"4 checkpoints of .* MB need .* lower train\.keep"):
        train.train(experiment)
    assert resume.saved_steps(experiment) == []
    monkeypatch.undo()
    train.train(experiment)
    size = resume.checkpoint_path(experiment, 8).stat().st_size
    weights = read_checkpoint(experiment.init_checkpoint).state_dict
    model = sum(value.numel() * value.element_size() for value in weights.values())
    assert size < 1.6 * preflight.CHECKPOINT_MODELS * model, "what is asked for is what it takes"
