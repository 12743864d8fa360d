"""True streaming against icefall's: outputs and caches at every chunk and batch size."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from icetransfer.model.checkpoint import load_transducer
from icetransfer.model.transducer import StreamingState, TransducerModel

ATOL = 1.0e-4
HEADS = ("num_heads", "query_head_dim", "value_head_dim", "pos_head_dim")
CASES = [f"c{chunk}_{batch}" for chunk in (8, 16, 32) for batch in ("b1_s0", "b1_s2", "b3")]


@pytest.fixture(scope="module")
def model(golden_dir: Path) -> TransducerModel:
    config = json.loads((golden_dir / "config.json").read_text())
    overrides = {flag: config[flag] for flag in HEADS}
    return load_transducer(golden_dir / "icefall-checkpoint.pt", **overrides)


@pytest.fixture(scope="module")
def facts(golden_dir: Path) -> dict[str, Any]:
    return json.loads((golden_dir / "streaming_outputs.json").read_text())


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> dict[str, Tensor]:
    with np.load(golden_dir / "streaming_outputs.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture(scope="module")
def streams(golden_dir: Path, facts: dict[str, Any]) -> list[Tensor]:
    """Each utterance cut to its length, with silence enough behind it."""
    with np.load(golden_dir / "features.npz") as file:
        x, lens = torch.from_numpy(file["x"]), file["x_lens"]
    tail = facts["pad_length"] + facts["tail_pad_len"]
    silence = torch.full((tail, x.size(2)), facts["log_eps"])
    return [torch.cat([x[i, :length], silence]) for i, length in enumerate(lens)]


def window(stream: Tensor, start: int, size: int, log_eps: float) -> Tensor:
    piece = stream[start : start + size]
    return torch.nn.functional.pad(piece, (0, 0, 0, size - len(piece)), value=log_eps)


def keep(state: StreamingState, rows: list[int]) -> StreamingState:
    pairs = zip(state.tensors(), state.batch_dims(), strict=True)
    return state.with_tensors([t.index_select(dim, torch.tensor(rows)) for t, dim in pairs])


def assert_state(state: StreamingState, golden: dict[str, Tensor], prefix: str) -> None:
    names = state.names()
    expected = {key.removeprefix(prefix) for key in golden if key.startswith(prefix)}
    assert expected in (set(), set(names))
    for name, value in zip(names, state.tensors(), strict=True):
        if expected:
            torch.testing.assert_close(value, golden[prefix + name], atol=ATOL, rtol=0.0)


@pytest.mark.parametrize("case", CASES)
def test_case(
    model: TransducerModel,
    facts: dict[str, Any],
    golden: dict[str, Tensor],
    streams: list[Tensor],
    case: str,
) -> None:
    facts_of_case = facts["cases"][case]
    chunk, left = facts_of_case["chunk_size"], facts_of_case["left_context_frames"]
    size, log_eps = facts_of_case["feature_frames_per_call"], facts["log_eps"]
    active: list[int] = facts_of_case["utts"]
    state = model.initial_state(len(active), chunk, left)
    rows: dict[int, list[Tensor]] = {utterance: [] for utterance in active}
    for k, call in enumerate(facts_of_case["calls"]):
        if call["active"] != active:
            state = keep(state, [active.index(utterance) for utterance in call["active"]])
            active = call["active"]
        features = torch.stack(
            [
                window(streams[utterance], start, size, log_eps)
                for utterance, start in zip(active, call["start_frame"], strict=True)
            ]
        )
        if (key := f"{case}_call{k}_features") in golden:
            assert torch.equal(features, golden[key])
        with torch.no_grad():
            out, state = model.encode_chunk(features, state, torch.tensor(call["feature_lens"]))
        for utterance, row in zip(active, out, strict=True):
            rows[utterance].append(row)
        if k == 0:
            assert_state(state, golden, f"{case}_after1.")
    if len(rows) == 1:
        assert_state(state, golden, f"{case}_final.")
    for utterance, outputs in rows.items():
        name = f"{case}_enc_out" if len(rows) == 1 else f"{case}_s{utterance}_enc_out"
        torch.testing.assert_close(torch.stack(outputs), golden[name], atol=ATOL, rtol=0.0)


def test_every_array_is_used(golden: dict[str, Tensor]) -> None:
    for name in golden:
        assert any(name.startswith(f"{case}_") for case in CASES), name


def test_state_names_and_shapes(model: TransducerModel, facts: dict[str, Any]) -> None:
    for tier, listed in facts["state_names"].items():
        chunk, left = (int(part[1:]) for part in tier.split("_"))
        state = model.initial_state(1, chunk, left)
        shapes = {n: list(t.shape) for n, t in zip(state.names(), state.tensors(), strict=True)}
        assert shapes == {entry["name"]: entry["shape_b1"] for entry in listed}
        assert state.names() == [entry["name"] for entry in listed]
