import json
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from icetransfer import train
from icetransfer.average import average_run
from icetransfer.config import Train
from icetransfer.data import blocks
from icetransfer.data.loader import dev_cuts
from icetransfer.data.tokenizer import Tokenizer
from icetransfer.model.checkpoint import load_transducer, read_checkpoint, save_checkpoint
from icetransfer.model.transducer import build_transducer
from icetransfer.score import count_errors
from icetransfer.streaming.search import greedy_search
from icetransfer.training import resume

SOURCES = str(Path(train.__file__).parent)


def checkpoint(experiment, step):
    return read_checkpoint(experiment.checkpoints_dir / f"checkpoint-{step}.pt")


def saved(experiment):
    return sorted(int(path.stem.split("-")[1]) for path in experiment.checkpoints_dir.iterdir())


def metrics(experiment):
    return [
        json.loads(line) for line in (experiment.dir / "metrics.jsonl").read_text().splitlines()
    ]


def assert_equal(one, two, where="checkpoint"):
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_equal(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            assert_equal(a, b, f"{where}.{i}")
    else:
        assert one == two, where


def test_a_run_writes_what_later_stages_read(prepare):
    experiment = prepare("whole")
    train.train(experiment)
    assert saved(experiment) == [5, 6, 8]  # 5: where the final average begins
    dims, weights, extra = checkpoint(experiment, 8)
    init = read_checkpoint(experiment.init_checkpoint)[1]
    assert weights.keys() == init.keys() == extra["model_avg"].keys()
    moved = [name for name in init if not torch.equal(weights[name], init[name])]
    assert {"encoder_embed.out.weight", "joiner.output_linear.weight"} < set(moved)
    assert extra["batch_idx_train"] == 8 and dims.vocab_size == 30
    assert list((experiment.dir / "tensorboard").iterdir())
    records = metrics(experiment)
    assert [r["step"] for r in records if r["kind"] == "train"] == [2, 4, 6, 8]
    assert [r["step"] for r in records if r["kind"] == "dev"] == [4, 8]
    assert all(0 < r["loss"] < 100 and r["ctc_loss"] > 0 for r in records)
    provenance = json.loads((experiment.dir / "provenance.json").read_text())
    assert provenance["train"]["steps"] == [0, 8]


def test_the_running_average_is_the_mean_of_the_models(prepare, monkeypatch):
    experiment = prepare("average", "train.max_steps=4", "train.checkpoint_every=2")
    assert train.average_period(experiment.config.train) == 1  # a tenth of the run at most
    seen = []
    update = train.update_averaged_model

    def spy(step, period, model, averaged):
        seen.append({name: value.double().clone() for name, value in model.state_dict().items()})
        update(step, period, model, averaged)

    monkeypatch.setattr(train, "update_averaged_model", spy)
    train.train(experiment)
    average = checkpoint(experiment, 4)[2]["model_avg"]
    for name, value in average.items():
        mean = torch.stack([model[name] for model in seen]).mean(dim=0)
        torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-9)


def test_a_killed_run_goes_on_to_the_same_result(prepare, monkeypatch):
    undisturbed, killed = prepare("undisturbed"), prepare("killed")
    train.train(undisturbed)

    def kill(self, step):
        if step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.Reporter, "progress", kill)
        with pytest.raises(KeyboardInterrupt):
            train.train(killed)
    assert saved(killed) == [3]
    train.train(killed)
    assert saved(killed) == saved(undisturbed)
    assert_equal(checkpoint(undisturbed, 8)[1:], checkpoint(killed, 8)[1:])
    # The means at step 4 begin at the checkpoint of step 3; all others are the same.
    reported = [
        [
            {key: value for key, value in record.items() if not key.endswith("_per_second")}
            for record in metrics(run)
            if (record["step"], record["kind"]) != (4, "train")
        ]
        for run in (undisturbed, killed)
    ]
    assert reported[0] == reported[1]
    assert len(metrics(killed)) == len(metrics(undisturbed))
    provenance = json.loads((killed.dir / "provenance.json").read_text())
    assert provenance["train"]["steps"] == [3, 8]

    last = killed.checkpoints_dir / "checkpoint-8.pt"
    written = last.stat().st_mtime_ns
    train.train(killed)  # complete: nothing to do
    assert last.stat().st_mtime_ns == written


def test_a_killed_run_with_helpers_goes_on_in_the_middle_of_its_blocks(prepare, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_CUTS", 10)
    settings = ("train.workers=2", "train.join_seconds=4")
    undisturbed, killed = (prepare(name, *settings) for name in ("blocks", "blockskilled"))
    train.train(undisturbed)

    def kill(self, step):
        if step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.Reporter, "progress", kill)
        with pytest.raises(KeyboardInterrupt):
            train.train(killed)
    train.train(killed)
    assert checkpoint(killed, 8)[2]["sampler"]["places"][0]["block"] > 0
    assert_equal(checkpoint(undisturbed, 8)[1:], checkpoint(killed, 8)[1:])


def test_en_and_ml_see_the_same_batches_at_the_same_tiers(prepare, monkeypatch):
    seen = {}
    inner = train.compute_losses
    for init in ("en", "ml"):
        batches = seen.setdefault(init, [])

        def spy(run, batch, features, chunk_size, left, batches=batches):
            batches.append((batch.ids, features.sum().item(), chunk_size, left))
            return inner(run, batch, features, chunk_size, left)

        monkeypatch.setattr(train, "compute_losses", spy)
        train.train(prepare(init, f"init={init}", "train.max_steps=3"))
    assert seen["en"] == seen["ml"]
    assert len(seen["en"]) > 3


def test_from_the_loop_to_the_losses_are_four_calls(prepare, monkeypatch):
    inner, chains = train.compute_losses, set()

    def spy(run, *rest):
        if run.model.training:
            own = [f.name for f in traceback.extract_stack() if f.filename == train.__file__]
            chains.add((*own, "compute_losses"))
        return inner(run, *rest)

    monkeypatch.setattr(train, "compute_losses", spy)
    train.train(prepare("chain", "train.max_steps=1", "train.valid_every=9"))
    steps = {chain for chain in chains if "train_step" in chain}  # the others are preflight's
    assert steps == {("train", "train_step", "forward_backward", "compute_losses")}


class HostReads(TorchDispatchMode):
    """Notes where a tensor's value is brought to the host, for which a GPU would have to wait."""

    OPERATORS = ("_local_scalar_dense", "nonzero", "equal", "masked_select")

    def __init__(self):
        super().__init__()
        self.places = []

    def note(self):
        frames = traceback.extract_stack()
        own = [frame for frame in frames if frame.filename.startswith(SOURCES)]
        self.places.append(f"{Path(own[-1].filename).relative_to(SOURCES)}:{own[-1].lineno}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.split(".")[0] in self.OPERATORS:
            self.note()
        return func(*args, **(kwargs or {}))


def test_a_step_reads_no_numbers_before_they_are_logged(prepare, monkeypatch):
    reads = HostReads()
    to_list = torch.Tensor.tolist  # no operator
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.note() or to_list(self))
    settings = ("train.max_steps=400", "train.log_every=50", "train.valid_every=50")
    run = resume.start_run(prepare("reads", *settings, "train.checkpoint_every=50"), None)
    batches, meter = iter(run.loader), train.Meter(run.bad)
    for step in range(1, 10):
        share = iter([next(batches)])
        reads.places.clear()
        with reads:
            train.train_step(run, share, meter, None)
            assert run.step == step and not run.world.any(False)
        # SpecAugment reads lengths, which are on the host; the model and its loss have own tests.
        others = ("data/augment.py", "model/", "training/rnnt.py")
        assert [place for place in reads.places if not place.startswith(others)] == []
    reads.places.clear()
    with reads:
        meter.means()
    assert reads.places[0].startswith("training/monitor.py")


def test_training_learns(prepare):
    experiment = prepare(
        "learns", "train.max_steps=40", "train.valid_every=40", "train.log_every=10",
        "train.schedule.warmup_steps=5", "train.spec_augment.enabled=false",
    )  # fmt: skip
    train.train(experiment)
    losses = [r["pruned_loss"] for r in metrics(experiment) if r["kind"] == "train"]
    assert losses[-1] < 0.6 * losses[0]


def test_parts_freeze_and_have_their_own_rates(prepare, monkeypatch):
    experiment = prepare(
        "parts", "train.freeze={encoder_embed: 3, encoder: 0, encoder.encoders.0: -1}",
        "train.lr_scale={joiner: 2, encoder: 0.5}", "train.checkpoint_every=1",
        "train.keep_checkpoints=9",
    )  # fmt: skip
    train.train(experiment)
    start = read_checkpoint(experiment.init_checkpoint).state_dict

    def moved(step, part):
        end = checkpoint(experiment, step).state_dict
        return [n for n in start if n.startswith(part) and not torch.equal(start[n], end[n])]

    assert not moved(3, "encoder_embed.") and moved(4, "encoder_embed.")
    assert not moved(8, "encoder.encoders.0.") and moved(1, "encoder.encoders.1.")
    assert moved(1, "joiner.")
    (first, *_) = (record for record in metrics(experiment) if record["kind"] == "train")
    assert first["lr_joiner"] == 4 * first["lr_encoder"]
    assert first["lr_joiner"] == pytest.approx(2 / 0.3 * first["lr_encoder_embed"]), "the scheme's"


def test_what_was_not_loaded_is_neither_frozen_nor_slowed(prepare):
    settings = ("train.freeze={encoder: -1}", "train.lr_scale={encoder: 0.5, joiner: 2}")
    groups = {}
    for init in ("ml", "random"):
        experiment = prepare(f"parts-{init}", f"init={init}", *settings)
        model = build_transducer(read_checkpoint(experiment.init_checkpoint).dims)
        optimizer = resume.make_optimizer(model, experiment.config)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups[init] = {
            names[id(parameter)].split(".")[0]: (group["lr"], group["freeze_steps"])
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
    lr = experiment.config.train.lr
    assert groups["ml"]["encoder"] == (0.5 * lr, -1)
    assert groups["random"]["encoder"] == (lr, 0)
    assert groups["ml"]["joiner"] == groups["random"]["joiner"] == (2 * lr, 0)


def test_freezing_everything_is_refused(prepare):
    parts = ("encoder_embed", "encoder", "decoder", "joiner", "simple_am_proj", "simple_lm_proj")
    frozen = ", ".join(f"{part}: 5" for part in (*parts, "ctc_output"))
    with pytest.raises(ValueError, match="leaves nothing to train"):
        train.train(prepare("allfrozen", f"train.freeze={{{frozen}}}"))


def test_dev_wer_is_measured_at_every_chunk_size(prepare):
    experiment = prepare(
        "wer", "train.dev_wer=true", "train.max_steps=40", "train.valid_every=20",
        "train.schedule.warmup_steps=5", "train.spec_augment.enabled=false",
    )  # fmt: skip
    train.train(experiment)
    model = load_transducer(experiment.checkpoints_dir / "checkpoint-40.pt")
    tokenizer = Tokenizer(experiment.lang_dir / "bpe.model")
    record = [r for r in metrics(experiment) if r["kind"] == "dev"][-1]
    wers = []
    for chunk_size, name in ((8, "8"), (16, "16"), (32, "32"), (-1, "offline")):
        pairs = []
        for cut in dev_cuts(experiment, 600):
            features = torch.from_numpy(cut.load_features())[None]
            left = -1 if chunk_size == -1 else 128
            with torch.no_grad():
                out = model.encode(features, torch.tensor([features.size(1)]), chunk_size, left)
            (tokens,) = greedy_search(model, *out)
            pairs.append((cut.supervisions[0].text.split(), tokenizer.decode(tokens).split()))
        wers.append(record[f"wer_chunk_{name}"])
        # Alone an utterance is not padded, and may be heard a little differently.
        assert wers[-1] == pytest.approx(count_errors(pairs).rate, abs=10)
    assert record["wer"] == pytest.approx(sum(wers) / 4)


def test_early_stop_ends_the_run_and_the_average(prepare, monkeypatch):
    experiment = prepare(
        "early", "train.dev_wer=true", "train.early_stop=2", "train.max_steps=20",
        "train.valid_every=2", "train.keep_best=1", "train.checkpoint_every=2",
    )  # fmt: skip
    wers = iter([90.0, 50.0, 40.0, 41.0, 40.0, 0.0])
    monkeypatch.setattr(train, "dev_wer", lambda *_: {"wer": next(wers)})
    train.train(experiment)
    # 6: the best; 8, 10: the last ones; 2 to 4 are gone.
    assert [s for s in resume.saved_steps(experiment) if s <= 10] == [6, 8, 10]
    assert resume.saved_steps(experiment)[-1] == 10
    train.train(experiment)  # complete
    experiment.stopped_early_path.write_text("")
    with pytest.raises(ValueError, match=r"stopped-early holds '', .* run stage 6 again"):
        train.train(experiment)
    experiment.stopped_early_path.unlink()
    train.train(experiment)  # finds in the last checkpoint that it has stopped
    assert experiment.stopped_early_path.read_text() == "10\n"
    assert next(wers) == 0.0
    average_run(experiment)
    extra = read_checkpoint(experiment.averaged_checkpoint).extra
    assert extra["averaged_steps"] == [6, 10]


def test_early_stop_needs_the_dev_wer():
    with pytest.raises(ValueError, match="early_stop needs dev_wer=true"):
        Train(early_stop=3)


def test_missing_pieces_say_which_stage_makes_them(prepare):
    experiment = prepare("missing")
    experiment.init_checkpoint.unlink()
    with pytest.raises(ValueError, match=r"init\.pt does not exist: run stage 5"):
        train.train(experiment)


def test_a_vocabulary_of_another_size_is_refused(prepare, nano_dims):
    experiment = prepare("vocabulary")
    save_checkpoint(experiment.init_checkpoint, build_transducer(nano_dims.with_vocabulary(31)))
    with pytest.raises(ValueError, match="has 31 tokens"):
        train.train(experiment)


def test_tiers_are_drawn_evenly_and_by_seed_and_step_alone():
    settings = Train()
    draws = [train.draw_tier(settings, 1, step) for step in range(2000)]
    assert draws == [train.draw_tier(settings, 1, step) for step in range(2000)]
    assert draws != [train.draw_tier(settings, 2, step) for step in range(2000)]
    chunks = Counter(chunk for chunk, _ in draws)
    assert set(chunks) == {8, 16, 32, -1}
    assert all(430 < count < 570 for count in chunks.values())
    assert {left for chunk, left in draws if chunk == -1} == {-1}
    assert {left for chunk, left in draws if chunk != -1} == {64, 128, -1}
    assert train.dev_tier(settings) == (32, 128)
    assert train.dev_tier(Train(chunk_sizes=(-1,))) == (-1, -1)


def test_schedules_end_in_the_first_tenth_from_scratch_and_at_once_from_weights():
    settings = Train(max_steps=1000)
    assert train.schedule_count(settings, 1, from_scratch=False) >= 20_000
    assert train.schedule_count(settings, 0, from_scratch=True) == 0
    assert train.schedule_count(settings, 50, from_scratch=True) == 10_000
    assert train.schedule_count(settings, 100, from_scratch=True) == 20_000


@pytest.mark.parametrize(
    "steps, keep, start, best, expected",
    [
        ([10, 20, 30, 40, 50], 2, 20, [], [10, 30]),
        ([10, 20], 3, 0, [], []),
        ([10, 20, 30, 35, 40], 1, 35, [], [10, 20, 30]),
        ([10, 20, 30], 1, 100, [], [10, 20]),
        ([10, 20, 30, 40, 50], 1, 40, [20], [10, 30]),
    ],
)
def test_the_start_of_the_average_and_the_best_are_not_deleted(steps, keep, start, best, expected):
    assert resume.surplus(steps, keep, start, best) == expected


def test_the_average_begins_on_an_update():
    assert resume.average_start(Train(max_steps=1000, average_fraction=0.3)) == 700
    assert (
        resume.average_start(Train(max_steps=1010, average_period=20, average_fraction=0.3)) == 700
    )
    assert resume.average_start(Train(max_steps=1000, average_fraction=1)) == 0
