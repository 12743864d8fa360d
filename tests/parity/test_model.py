"""The model against icefall's own numbers: encoder and its stacks, decoder, joiner, projections."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from icetransfer.model.checkpoint import load_transducer, read_checkpoint
from icetransfer.model.transducer import TransducerModel

ATOL = 1.0e-4  # the same algorithm in another order; 3e-6 is typical
DATA = Path(__file__).parent / "data"
HEADS = ("num_heads", "query_head_dim", "value_head_dim", "pos_head_dim")
MASKED = ("c8_l32", "c16_l64", "c32_l64", "c32_l128", "c64_l128", "c16_lall")

Arrays = dict[str, Tensor]


def arrays(path: Path) -> Arrays:
    with np.load(path) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=ATOL, rtol=0.0)


@pytest.fixture(scope="module")
def config(golden_dir: Path) -> dict[str, Any]:
    return json.loads((golden_dir / "config.json").read_text())


@pytest.fixture(scope="module")
def model(golden_dir: Path, config: dict[str, Any]) -> TransducerModel:
    overrides = {flag: config[flag] for flag in HEADS}
    return load_transducer(golden_dir / "icefall-checkpoint.pt", **overrides)


@pytest.fixture(scope="module")
def features(golden_dir: Path) -> Arrays:
    return arrays(golden_dir / "features.npz")


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> Arrays:
    return arrays(golden_dir / "eval_outputs.npz")


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def encode_stacks(
    model: TransducerModel, features: Arrays, chunk_size: int, left_context: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The encoder's output, its lengths, and the output of every stack as (T, N, C)."""
    stacks: list[Tensor] = []
    handles = [
        stack.register_forward_hook(lambda _m, _i, out: stacks.append(out.transpose(0, 1)))
        for stack in model.encoder.encoders
    ]
    out, lens = model.encode(features["x"], features["x_lens"], chunk_size, left_context)
    for handle in handles:
        handle.remove()
    return out, lens, stacks


def test_parameters_have_icefalls_names_order_and_shapes(
    model: TransducerModel, config: dict[str, Any]
) -> None:
    own = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert own == config["_param_shapes"]
    assert list(own) == list(config["_param_shapes"])
    assert not list(model.buffers())


def test_front_end(model: TransducerModel, features: Arrays, golden: Arrays) -> None:
    close(model.encoder_embed(features["x"]), golden["embed_out"])
    assert torch.equal((features["x_lens"] - 7) // 2, golden["embed_lens"])


def test_full_context_and_every_stack(
    model: TransducerModel, features: Arrays, golden: Arrays
) -> None:
    out, lens, stacks = encode_stacks(model, features, -1, -1)
    close(out, golden["enc_full"])
    assert torch.equal(lens, golden["enc_lens"])
    for i, stack in enumerate(stacks):
        close(stack, golden[f"full_stack{i}"])


def test_one_utterance_without_padding(
    model: TransducerModel, features: Arrays, golden: Arrays
) -> None:
    length = features["x_lens"][1:2]
    out, _ = model.encode(features["x"][1:2, : length.item()], length)
    close(out, golden["enc_full_utt1_alone"])


@pytest.mark.parametrize("case", MASKED)
def test_masked(model: TransducerModel, features: Arrays, golden: Arrays, case: str) -> None:
    chunk, left = case.split("_")
    left_context = -1 if left == "lall" else int(left[1:])
    out, _, stacks = encode_stacks(model, features, int(chunk[1:]), left_context)
    close(out, golden[f"enc_{case}"])
    if case == "c16_l64":
        for i, stack in enumerate(stacks):
            close(stack, golden[f"c16_l64_stack{i}"])


def test_decoder(model: TransducerModel, golden: Arrays) -> None:
    close(model.decoder(golden["dec_hist"]), golden["dec_out"])
    close(model.predict(golden["dec_ctx"]), golden["dec_ctx_out"])


def test_joiner_and_simple_projections(model: TransducerModel, golden: Arrays) -> None:
    encoder_out, decoder_out = golden["enc_full"], golden["dec_out"]
    close(model.joiner.encoder_proj(encoder_out), golden["joiner_enc_proj"])
    close(model.joiner.decoder_proj(decoder_out), golden["joiner_dec_proj"])
    close(model.simple_am_proj(encoder_out), golden["simple_am"])
    close(model.simple_lm_proj(decoder_out), golden["simple_lm"])
    frames = encoder_out[:, 0:12:2]
    logits = model.joiner(frames.unsqueeze(2), decoder_out.unsqueeze(1))
    close(logits, golden["joiner_logits"])
    projected = model.joiner(
        golden["joiner_enc_proj"][:, 0:12:2].unsqueeze(2),
        golden["joiner_dec_proj"].unsqueeze(1),
        project_input=False,
    )
    close(projected, golden["joiner_logits"])
    one = model.join(frames[:, :1], decoder_out[:, 3:4])
    close(one, golden["joiner_logits"][:, 0, 3:4])


@pytest.mark.parametrize("weights", ["model", "model_avg"])
def test_training_checkpoint(golden_dir: Path, weights: str) -> None:
    """A whole training checkpoint, with paths and dtypes inside, and its own heads."""
    expected = arrays(golden_dir / "epoch-1_outputs.npz")
    path = golden_dir / "epoch-1.pt"
    model = load_transducer(path)
    if weights == "model_avg":
        model.load_state_dict(read_checkpoint(path).extra["model_avg"])
    out, lens = model.encode(expected["x"], expected["x_lens"])
    close(out, expected[f"enc_full_{weights}"])
    assert torch.equal(lens, expected["enc_lens"])


def test_nano_copy() -> None:
    """A cut of the same checkpoint that lies in the repository, for a clone on its own."""
    expected = arrays(DATA / "nano-outputs.npz")
    model = load_transducer(DATA / "nano-checkpoint.pt")
    out, lens = model.encode(expected["x"], expected["x_lens"])
    close(out, expected["enc_full_model"])
    assert torch.equal(lens, expected["enc_lens"])
