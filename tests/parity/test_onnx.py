"""ONNX exports against icefall's: names, metadata, numbers, and what sherpa-onnx prints."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import soundfile
import torch
from torch import Tensor

from icetransfer.data.features import fbank
from icetransfer.decode import decode_offline, decode_streams, tail_seconds
from icetransfer.export import Source, export_tier
from icetransfer.streaming.exported import Exported
from icetransfer.streaming.onnx_model import OnnxTransducer
from icetransfer.streaming.search import SHERPA, Convention, GreedySearch, make_search
from icetransfer.streaming.sherpa import SherpaRecognizer

CHUNK, LEFT = 16, 64
SECTIONS = {CHUNK: "streaming (chunk 16, left 64)", -1: "non-streaming"}
SEARCHES = ("greedy_search", "modified_beam_search")
SHAPELESS = ("num_heads", "query_head_dim", "value_head_dim", "pos_head_dim")


@pytest.fixture(scope="module")
def source(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    config = json.loads((golden_dir / "config.json").read_text())
    tokens = tmp_path_factory.mktemp("lang") / "tokens.txt"
    names = ["<blk>", "t1", "<unk>", *(f"t{i}" for i in range(3, config["vocab_size"]))]
    tokens.write_text("".join(f"{name} {i}\n" for i, name in enumerate(names)))
    overrides = {key: config[key] for key in SHAPELESS}
    return Source.load(golden_dir / "icefall-checkpoint.pt", tokens, **overrides)


@pytest.fixture(scope="module")
def bundles(source: Source, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Exported]:
    folder = tmp_path_factory.mktemp("onnx")
    found = {size: Exported(folder / str(size)) for size in SECTIONS}
    export_tier(source, found[CHUNK], CHUNK, LEFT, ["int8"])
    export_tier(source, found[-1], -1, LEFT, ["int8"], heads=found[CHUNK])
    return found


@pytest.fixture(scope="module")
def arrays(golden_dir: Path) -> dict[str, Tensor]:
    with np.load(golden_dir / "onnx_outputs.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


def described(values: Any) -> list[dict[str, Any]]:
    return [
        {
            "name": value.name,
            "dtype": onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type),
            "shape": [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
        }
        for value in values
    ]


def nameless(values: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the names that the exporter makes up for dimensions of outputs."""
    own = ("N", "T")
    return [
        v | {"shape": [d if isinstance(d, int) or d in own else "?" for d in v["shape"]]}
        for v in values
    ]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("part", ["encoder", "decoder", "joiner"])
@pytest.mark.parametrize("size", SECTIONS)
def test_names_shapes_and_metadata(golden_dir, bundles, size, part, precision) -> None:
    golden = json.loads((golden_dir / "onnx_metadata.json").read_text())[SECTIONS[size]]
    # our decoder is never quantised
    expected = golden[part if precision == "fp32" or part == "decoder" else f"{part}_{precision}"]
    proto = onnx.load(str(bundles[size].model(part, precision)))
    assert {p.key: p.value for p in proto.metadata_props} == expected["metadata"]
    assert described(proto.graph.input) == expected["inputs"]
    assert nameless(described(proto.graph.output)) == nameless(expected["outputs"])
    assert ["", proto.opset_import[0].version] == expected["opset"][0]


def test_int8_files_hold_int8_products(bundles) -> None:
    for part in ("encoder", "joiner"):
        proto = onnx.load(str(bundles[CHUNK].model(part, "int8")))
        assert "MatMulInteger" in {node.op_type for node in proto.graph.node}
    assert bundles[CHUNK].size("int8") < bundles[CHUNK].size("fp32")


def test_streaming_outputs_and_states(bundles, arrays) -> None:
    model = OnnxTransducer(bundles[CHUNK].dir)
    state = model.initial_state(1, CHUNK, LEFT)
    outs = []
    for call, start in enumerate(arrays["starts"].tolist()):
        window = arrays["feat_padded"][start : start + 2 * CHUNK + 13].unsqueeze(0)
        out, state = model.encode_chunk(window, state)
        outs.append(out)
        for when, last in (("after1", 0), ("final", len(arrays["starts"]) - 1)):
            if call == last:
                for name, tensor in zip(state.names(), state.tensors(), strict=True):
                    expected = arrays[f"enc_state_{when}.{name}"]
                    torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(outs), arrays["enc_out_chunks"], rtol=1e-4, atol=1e-4)


def test_offline_outputs(golden_dir, bundles, arrays) -> None:
    model = OnnxTransducer(bundles[-1].dir)
    with np.load(golden_dir / "features.npz") as file:
        features, lens = torch.from_numpy(file["x"]), torch.from_numpy(file["x_lens"])
    out, out_lens = model.encode(features, lens)
    expected = arrays["nonstreaming.encoder_out"]
    assert out_lens.tolist() == arrays["nonstreaming.encoder_out_lens"].tolist()
    for row, length in enumerate(out_lens.tolist()):
        torch.testing.assert_close(out[row, :length], expected[row, :length], rtol=1e-4, atol=1e-4)


def test_decoder_and_joiner(bundles, arrays) -> None:
    model = OnnxTransducer(bundles[CHUNK].dir)
    out = model.predict(arrays["dec_y"])
    torch.testing.assert_close(out.squeeze(1), arrays["dec_out"], rtol=1e-4, atol=1e-5)
    logits = model.join(arrays["joiner_enc_in"].unsqueeze(1), arrays["dec_out"].unsqueeze(1))
    torch.testing.assert_close(logits.squeeze(1), arrays["joiner_logit"], rtol=1e-4, atol=1e-5)


def test_greedy_from_blanks_without_unk(bundles, arrays) -> None:
    model = OnnxTransducer(bundles[CHUNK].dir)
    search = GreedySearch(model, Convention(start=0, silent=(2,)))
    out = arrays["enc_out_chunks"].flatten(0, 1).unsqueeze(0)
    (found,) = search(out, torch.tensor([out.size(1)]))
    assert found.tokens == arrays["greedy_tokens_ctx_blank_unk2_excluded"].tolist()


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("size", SECTIONS)
def test_what_sherpa_prints(golden_dir, bundles, size, search) -> None:
    key = "sherpa_onnx_" + ("offline_" if size == -1 else "") + search
    expected = json.loads((golden_dir / "onnx_outputs.json").read_text())[key]
    with np.load(golden_dir / "fbank.npz") as file:
        wave = file["wave_int16"].astype(np.float32) / 32768
    tail = expected.get("tail_padding_s", 0.0)
    recognizer = SherpaRecognizer(bundles[size].dir, size, search=search, tail_seconds=tail)
    (found,) = recognizer([wave])
    assert [f"t{token}" for token in found.tokens] == expected["tokens"]
    assert [round(t * 0.04, 2) for t in found.timestamps] == expected["timestamps"]


@pytest.fixture(scope="module")
def waveforms(speech_dir: Path) -> list[np.ndarray]:
    """Real speech, and lengths about those of a chunk and of the window that it reads."""
    files = sorted((speech_dir / "nl_nathalie" / "audio").glob("*.flac"))[:6]
    speech = [soundfile.read(file, dtype="float32")[0] for file in files]
    chunk, window = 2 * CHUNK * 160, (2 * CHUNK + 13) * 160
    lengths = [100, chunk - 1, chunk, chunk + 1, window, window + 1]
    return sorted([speech[0][9000 : 9000 + n] for n in lengths] + speech, key=len)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("size", SECTIONS)
def test_three_engines_agree(source, bundles, waveforms, size, search) -> None:
    engines = {"torch": source.model, "onnxruntime": OnnxTransducer(bundles[size].dir)}
    found = {}
    for name, model in engines.items():
        searcher = make_search(search, model, 4, SHERPA)
        keyed = ((str(i), wave) for i, wave in enumerate(waveforms))
        if size == -1:
            hypotheses = dict(decode_offline(model, searcher, keyed, 5))
        else:
            hypotheses = dict(decode_streams(model, searcher, keyed, size, LEFT, 5))
        found[name] = [hypotheses[str(i)] for i in range(len(waveforms))]
    tail = tail_seconds(size)
    sherpa = SherpaRecognizer(bundles[size].dir, size, search=search, tail_seconds=tail)
    pending = iter(waveforms)
    found["sherpa"] = [h for _ in range(3) for h in sherpa(list(islice(pending, 5)))]
    assert found["torch"] == found["onnxruntime"] == found["sherpa"]
    assert sum(len(h.tokens) for h in found["torch"]) > 20


def test_every_frame_of_the_audio_is_searched(source, waveforms) -> None:
    """With the tail, the last window begins after the last feature frame of the recording."""
    for size in (8, 16, 32):
        for wave in waveforms:
            silence = np.zeros(round(tail_seconds(size) * 16000), dtype=np.float32)
            frames, own = len(fbank(np.concatenate([wave, silence]))), len(fbank(wave))
            windows = len([k for k in range(frames) if k * 2 * size + 2 * size + 13 < frames])
            assert windows * 2 * size >= own + 25
