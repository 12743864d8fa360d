"""Low-rank adapters: nothing changes at first, little is trained, and it merges."""

from pathlib import Path

import pytest
import torch

from icetransfer import train
from icetransfer.model.adapters import adapter_state, attach, plain_state
from icetransfer.model.checkpoint import load_transducer, read_checkpoint, save_checkpoint
from icetransfer.model.transducer import TransducerDims, TransducerModel, build_transducer

PARTS = ("encoder_embed", "encoder")
SETTINGS = ("transfer.adapters.rank=2",)  # of all that is loaded; the front end stays as it is


def encode(model: TransducerModel) -> torch.Tensor:
    features = torch.randn(2, 100, 80, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval().encode(features, torch.tensor([100, 80]))[0]


def test_attached_adapters_change_nothing_and_merge(
    nano_dims: TransducerDims, tmp_path: Path
) -> None:
    model = build_transducer(nano_dims, seed=1)
    before, names = encode(model), list(model.state_dict())
    attach(model, 2, ("encoder",), seed=5)
    torch.testing.assert_close(encode(model), before, rtol=1e-4, atol=1e-5)
    adapters = [name for name in adapter_state(model) if name.endswith(".up")]
    # Of each of the two layers: attention weights, two attentions, non-linear one, feed-forwards.
    assert len(adapters) == 2 * (1 + 2 * 2 + 2 + 3 * 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    assert sorted(plain_state(model)) == sorted(names)
    changed = encode(model)
    assert (changed - before).abs().max() > 1e-2
    save_checkpoint(tmp_path / "merged.pt", model)
    merged = load_transducer(tmp_path / "merged.pt")
    assert list(merged.state_dict()) == names
    torch.testing.assert_close(encode(merged), changed)


def test_the_seed_decides_the_start(nano_dims: TransducerDims) -> None:
    states = []
    for seed in (1, 1, 2):
        model = build_transducer(nano_dims, seed=1)
        attach(model, 2, ("encoder.encoders.0",), seed)
        states.append(torch.cat([value.flatten() for value in adapter_state(model).values()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_a_part_without_attention_is_an_error(nano_dims: TransducerDims) -> None:
    with pytest.raises(ValueError, match=r"transfer\.adapters\.parts=\['joiner'\]: no attention"):
        attach(build_transducer(nano_dims), 2, ("joiner",), seed=1)


def test_training_moves_the_adapters_and_what_is_new(prepare, monkeypatch) -> None:
    undisturbed, killed = (prepare(name, *SETTINGS) for name in ("adapted", "adaptedkilled"))
    train.train(undisturbed)
    start = read_checkpoint(undisturbed.init_checkpoint).state_dict
    end = read_checkpoint(undisturbed.checkpoints_dir / "checkpoint-8.pt")
    model = load_transducer(undisturbed.checkpoints_dir / "checkpoint-8.pt")
    assert model.state_dict().keys() == start.keys() == end.extra["model_avg"].keys()
    moved = {n for n, v in end.state_dict.items() if (v - start[n]).abs().max() > 1e-6}
    in_encoder = {name for name in moved if name.startswith("encoder")}
    assert in_encoder and all(
        name.endswith(("in_proj.weight", "out_proj.weight")) for name in in_encoder
    )
    assert {"joiner.output_linear.weight", "decoder.embedding.weight"} < moved
    name = "encoder.encoders.0.layers.0.feed_forward1.in_proj.weight"
    start_product = end.state_dict[name] - start[name]
    assert torch.linalg.matrix_rank(start_product, rtol=1e-4) <= 4  # U D less the U D of the start

    def die(step: int, *_: object) -> None:
        update(step, *_)
        if step == 4:
            raise KeyboardInterrupt

    update = train.update_averaged_model
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "update_averaged_model", die)
        train.train(killed)
    train.train(killed)
    again = read_checkpoint(killed.checkpoints_dir / "checkpoint-8.pt")
    for name, value in end.state_dict.items():
        assert torch.equal(value, again.state_dict[name]), name
