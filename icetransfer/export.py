r"""Stage 8: the averaged model in ONNX for sherpa-onnx, an export for each latency tier.

    python -m icetransfer.export --exp DIR
    python -m icetransfer.export checkpoint=epoch-30.pt tokens=tokens.txt out=DIR \
        chunk_size=16 left_context_frames=64 precisions=fp32,int8,int4 \
        [num_heads=4,4,4,8,4,4 ...] [export.int4.block_size=64 ...]

The second form takes any icefall or icetransfer checkpoint; what its shapes do not tell is given
under icefall's names, and how precisions are made under the config's.  chunk_size may be a list
(8,16,-1): then `out` gets a folder for each, as in an experiment.  -1 is the non-streaming model.

Shapes: N streams, T feature frames (10 ms), c chunk_size (20 ms), C encoder channels, J joiner
channels, V vocabulary, L tokens of decoder context.  The joiner's two input projections are inside
the encoder's and the decoder's graphs.
"""

import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from icetransfer.config import Export, Precision, load_section, tier_folder
from icetransfer.experiment import Experiment, log, main, provenance, run_stage, write_provenance
from icetransfer.model.checkpoint import load_transducer
from icetransfer.model.subsampling import FEATURE_DIM, WINDOW_EXTRA
from icetransfer.model.transducer import StreamingState, TransducerModel
from icetransfer.onnx.graph import name_layers, shorten_names, simplify
from icetransfer.onnx.quantize import quantize_export, same_file
from icetransfer.stage import atomic
from icetransfer.stage.json_file import read_json
from icetransfer.stage.stamp import sha256
from icetransfer.streaming.exported import (
    Exported,
    check_vocabulary,
    file_facts,
    read_tokens,
    write_tokens,
)
from icetransfer.streaming.onnx_model import OnnxTransducer

OPSET = 13  # what sherpa-onnx's oldest runtimes read, and what icefall's exports use
TOLERANCE = 1e-3  # largest difference from torch, relative to outputs above 1
EMBED_CHANNELS = 128  # sherpa-onnx 2.0.1 makes embed_states (N, 128, 3, 19) whatever the graph says
_TRACED_STREAMS = 2  # 1 would be traced as a constant
_TRACED_FRAMES = 100


def widen_embed_states(tensors: list[Tensor]) -> list[Tensor]:
    """Pads the front end's cache to the number of channels that sherpa-onnx hands in."""
    *others, embed_states, processed_lens = tensors
    missing = EMBED_CHANNELS - embed_states.size(1)
    return [*others, F.pad(embed_states, (0, 0, 0, 0, 0, missing)), processed_lens]


class StreamingEncoderGraph(nn.Module):
    """One chunk and the caches of its streams -> projected frames and the next caches."""

    def __init__(self, model: TransducerModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Maps x (N, 2c + 13, 80) and the state's tensors to (N, c // 2, J) and the next ones."""
        *others, embed_states, processed_lens = tensors
        own = self.model.dims.subsampling_channels[-1]
        if own < EMBED_CHANNELS:
            embed_states = embed_states[:, :own]
        out, new = self.model.streaming_forward(x, [*others, embed_states, processed_lens])
        if own < EMBED_CHANNELS:
            new = widen_embed_states(new)
        return (self.model.joiner.encoder_proj(out), *new)


class OfflineEncoderGraph(nn.Module):
    """Whole utterances -> projected frames and their number."""

    def __init__(self, model: TransducerModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Maps x (N, T, 80), x_lens (N,) to (N, T4, J), (N,)."""
        out, out_lens = self.model.encode(x, x_lens, chunk_size=-1)
        return self.model.joiner.encoder_proj(out), out_lens


class DecoderGraph(nn.Module):
    """The last tokens -> projected decoder output."""

    def __init__(self, model: TransducerModel) -> None:
        super().__init__()
        self.decoder = model.decoder
        self.proj = model.joiner.decoder_proj

    def forward(self, y: Tensor) -> Tensor:
        """Maps y (N, L) to (N, J)."""
        out: Tensor = self.proj(self.decoder.predict(y).squeeze(1))
        return out


class JoinerGraph(nn.Module):
    """Projected encoder and decoder outputs -> logits."""

    def __init__(self, model: TransducerModel) -> None:
        super().__init__()
        self.joiner = model.joiner

    def forward(self, encoder_out: Tensor, decoder_out: Tensor) -> Tensor:
        """Maps (N, J), (N, J) to (N, V)."""
        logits: Tensor = self.joiner(encoder_out, decoder_out, project_input=False)
        return logits


def _trace(
    graph: nn.Module,
    inputs: dict[str, Tensor],
    outputs: list[str],
    dynamic: dict[str, dict[int, str]],
    metadata: dict[str, str],
    target: Path,
) -> None:
    """Writes a graph with named inputs and outputs and sherpa-onnx's metadata.

    Args:
        graph: what to trace.
        inputs: by name, with `_TRACED_STREAMS` streams.
        outputs: names.
        dynamic: the dimensions that change, "N" or "T", by name and position.
        metadata: of the file.
        target: the file.
    """
    with (
        atomic.atomic_path(target) as temporary,
        warnings.catch_warnings(),
        torch.inference_mode(),
    ):
        # It warns of its age and of every Python branch; the check against torch decides.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph.eval(),  # the exporter puts back the mode it finds, and train is the default
            tuple(inputs.values()),
            str(temporary),
            input_names=list(inputs),
            output_names=outputs,
            dynamic_axes=dynamic,
            opset_version=OPSET,
            dynamo=False,
        )
        proto = onnx.load(str(temporary))
        simplify(proto, [_zeros(inputs, dynamic, n, 41 + 20 * n) for n in (1, 2, 3)])
        weights = {k.removeprefix("model."): v.numpy() for k, v in graph.state_dict().items()}
        name_layers(proto.graph, weights)
        shorten_names(proto)
        onnx.helper.set_model_props(proto, metadata)
        onnx.save(proto, str(temporary))


def _zeros(
    inputs: dict[str, Tensor], dynamic: dict[str, dict[int, str]], streams: int, frames: int
) -> dict[str, NDArray[np.generic]]:
    """Inputs of another size than traced."""
    sizes = {"N": streams, "T": frames}
    arrays = {}
    for name, tensor in inputs.items():
        shape = [sizes.get(dynamic[name].get(d, ""), size) for d, size in enumerate(tensor.shape)]
        value = frames if name == "x_lens" else 0
        arrays[name] = torch.full(shape, value, dtype=tensor.dtype).numpy()
    return arrays


def _commas(numbers: list[int]) -> str:
    return ",".join(str(number) for number in numbers)


def _streaming_metadata(model: TransducerModel, state: StreamingState) -> dict[str, str]:
    dims = model.dims
    left = [state.left_context_frames // factor for factor in dims.downsampling_factor]
    return {
        "model_type": "zipformer2",
        "version": "1",
        "model_author": "k2-fsa",
        "comment": "streaming zipformer2",
        "decode_chunk_len": str(2 * state.chunk_size),
        "T": str(2 * state.chunk_size + WINDOW_EXTRA),
        "num_encoder_layers": _commas([*dims.num_encoder_layers]),
        "encoder_dims": _commas([*dims.encoder_dim]),
        "cnn_module_kernels": _commas([*dims.cnn_module_kernel]),
        "left_context_len": _commas(left),
        "query_head_dims": _commas([*dims.query_head_dim]),
        "value_head_dims": _commas([*dims.value_head_dim]),
        "num_heads": _commas([*dims.num_heads]),
    }


def _export_streaming_encoder(
    model: TransducerModel, chunk_size: int, left_context_frames: int, target: Path
) -> None:
    if model.dims.subsampling_channels[-1] > EMBED_CHANNELS:
        raise ValueError(
            f"the front end has {model.dims.subsampling_channels[-1]} channels; sherpa-onnx "
            f"streams models with at most {EMBED_CHANNELS}: choose smaller subsampling_channels"
        )
    state = model.initial_state(_TRACED_STREAMS, chunk_size, left_context_frames)
    x = torch.randn(_TRACED_STREAMS, 2 * chunk_size + WINDOW_EXTRA, FEATURE_DIM)
    tensors = widen_embed_states(state.tensors())
    inputs = {"x": x, **dict(zip(state.names(), tensors, strict=True))}
    new_names = [f"new_{name}" for name in state.names()]
    streams = {"x": {0: "N"}, "encoder_out": {0: "N"}}
    for name, new, dim in zip(state.names(), new_names, state.batch_dims(), strict=True):
        streams[name] = streams[new] = {dim: "N"}
    metadata = _streaming_metadata(model, state)
    graph = StreamingEncoderGraph(model)
    _trace(graph, inputs, ["encoder_out", *new_names], streams, metadata, target)


def _export_offline_encoder(model: TransducerModel, target: Path) -> None:
    x = torch.randn(_TRACED_STREAMS, _TRACED_FRAMES, FEATURE_DIM)
    x_lens = torch.tensor([_TRACED_FRAMES, _TRACED_FRAMES - 10])
    dynamic = {
        "x": {0: "N", 1: "T"},
        "x_lens": {0: "N"},
        "encoder_out": {0: "N", 1: "T"},
        "encoder_out_lens": {0: "N"},
    }
    metadata = {
        "model_type": "zipformer2",
        "version": "1",
        "model_author": "k2-fsa",
        "comment": "non-streaming zipformer2",
    }
    outputs = ["encoder_out", "encoder_out_lens"]
    graph = OfflineEncoderGraph(model)
    _trace(graph, {"x": x, "x_lens": x_lens}, outputs, dynamic, metadata, target)


def _export_heads(model: TransducerModel, exported: Exported) -> None:
    y = torch.zeros(_TRACED_STREAMS, model.context_size, dtype=torch.int64)
    streams = {"y": {0: "N"}, "decoder_out": {0: "N"}}
    metadata = {"context_size": str(model.context_size), "vocab_size": str(model.vocab_size)}
    target = exported.model("decoder", "fp32")
    _trace(DecoderGraph(model), {"y": y}, ["decoder_out"], streams, metadata, target)
    joiner_dim = model.dims.joiner_dim
    names = ("encoder_out", "decoder_out")
    inputs = {name: torch.randn(_TRACED_STREAMS, joiner_dim) for name in names}
    streams = {name: {0: "N"} for name in (*names, "logit")}
    metadata = {"joiner_dim": str(joiner_dim)}
    target = exported.model("joiner", "fp32")
    _trace(JoinerGraph(model), inputs, ["logit"], streams, metadata, target)


def _difference(ours: Tensor, torchs: Tensor) -> float:
    return float((ours - torchs).abs().max() / max(1.0, float(torchs.abs().max())))


@torch.inference_mode()
def verify_export(model: TransducerModel, exported: Exported, chunk_size: int) -> float:
    """Runs the fp32 graphs beside torch on random input: other batch sizes and lengths than traced.

    Args:
        model: what was exported.
        exported: the files.
        chunk_size: of the export.

    Returns:
        The largest difference, relative to outputs above 1.

    Raises:
        RuntimeError: it is above `TOLERANCE`.
    """
    onnx_model = OnnxTransducer(exported.dir)
    random = torch.Generator().manual_seed(0)
    differences = {}
    streams = 3
    if chunk_size == -1:
        features = torch.randn(streams, 171, FEATURE_DIM, generator=random)
        lens = torch.tensor([171, 160, 33])
        out, out_lens = model.encode(features, lens, chunk_size=-1)
        ours, our_lens = onnx_model.encode(features, lens)
        if our_lens.tolist() != out_lens.tolist():
            raise RuntimeError(
                f"{exported.dir}: output lengths {our_lens.tolist()}, torch {out_lens.tolist()}"
            )
        out = model.joiner.encoder_proj(out)
        differences["encoder"] = max(
            _difference(a[:n], b[:n]) for a, b, n in zip(ours, out, out_lens.tolist(), strict=True)
        )
    else:
        state = model.initial_state(streams, chunk_size, onnx_model.left_context_frames)
        our_state = onnx_model.initial_state(streams, chunk_size, onnx_model.left_context_frames)
        worst = 0.0
        for _ in range(2):
            shape = (streams, 2 * chunk_size + WINDOW_EXTRA, FEATURE_DIM)
            features = torch.randn(shape, generator=random)
            out, state = model.encode_chunk(features, state)
            ours, our_state = onnx_model.encode_chunk(features, our_state)
            tensors = widen_embed_states(state.tensors())
            pairs = zip(our_state.tensors(), tensors, strict=True)
            worst = max(worst, *(_difference(a, b) for a, b in pairs))
            worst = max(worst, _difference(ours, model.joiner.encoder_proj(out)))
        differences["encoder"] = worst
    tokens = torch.randint(-1, model.vocab_size, (7, model.context_size), generator=random)
    decoder_out = model.joiner.decoder_proj(model.predict(tokens))
    differences["decoder"] = _difference(onnx_model.predict(tokens), decoder_out)
    frame = torch.randn(7, 1, model.dims.joiner_dim, generator=random)
    logits = model.joiner(frame, decoder_out, project_input=False)
    differences["joiner"] = _difference(onnx_model.join(frame, decoder_out), logits)
    part, worst = max(differences.items(), key=lambda item: item[1])
    if not worst <= TOLERANCE:
        raise RuntimeError(
            f"{exported.model(part, 'fp32')}: differs from torch by {worst:.2g} (at most "
            f"{TOLERANCE} was expected); this is a fault of the export, please report it"
        )
    return worst


@dataclass(frozen=True)
class Source:
    """What an export is made of."""

    checkpoint: Path
    model: TransducerModel
    tokens: Path
    sha256: str

    @classmethod
    def load(cls, checkpoint: Path, tokens: Path, **overrides: Any) -> "Source":
        """Reads a checkpoint and checks the token list against it.

        Raises:
            ValueError: either is not what it should be, or they do not fit.
        """
        model = load_transducer(checkpoint, **overrides)
        check_vocabulary(read_tokens(tokens), tokens, model.vocab_size, checkpoint)
        return cls(checkpoint, model, tokens, sha256(checkpoint))


def export_tier(
    source: Source,
    exported: Exported,
    chunk_size: int,
    left_context_frames: int,
    precisions: Sequence[str],
    heads: Exported | None = None,
    settings: Export | None = None,
    kept: Mapping[str, list[str]] | None = None,
) -> None:
    """Writes one tier, unless it is complete, of the same checkpoint and made in the same way.

    Args:
        source: the model.
        exported: where to.
        chunk_size: in 50 Hz frames; -1 for the non-streaming model.
        left_context_frames: in 50 Hz frames; without meaning for -1.
        precisions: "fp32" and others; the fp32 files are always written.
        heads: an export of the same model, whose decoder and joiner are the same.
        settings: how the precisions below fp32 are made.
        kept: by precision, the encoder's layers that are left in a higher one.

    Raises:
        ValueError: an illegal chunk size or an unknown precision.
        RuntimeError: the graphs do not agree with torch.
    """
    source.model.dims.check_chunk_size(chunk_size)
    settings, kept = settings or Export(), kept or {}
    wanted = sorted({"fp32", *precisions})
    made_of = {
        "sha256": source.sha256,
        "chunk_size": chunk_size,
        "left_context_frames": -1 if chunk_size == -1 else left_context_frames,
        "precisions": wanted,
        "export": settings.model_dump(mode="json"),
        "kept": {precision: sorted(kept.get(precision, ())) for precision in wanted},
    }
    if exported.description.is_file():
        found = read_json(exported.description, ["made_of"])
        if found["made_of"] == made_of:
            log.info("skip: %s is complete", exported.dir)
            return
        exported.description.unlink()  # from here on the export is not complete
    begin = time.perf_counter()
    if chunk_size == -1:
        _export_offline_encoder(source.model, exported.model("encoder", "fp32"))
    else:
        target = exported.model("encoder", "fp32")
        _export_streaming_encoder(source.model, chunk_size, left_context_frames, target)
    if heads is None:
        _export_heads(source.model, exported)
    else:
        for part in ("decoder", "joiner"):
            same_file(heads.model(part, "fp32"), exported.model(part, "fp32"))
    write_tokens(read_tokens(source.tokens), exported.tokens)
    difference = verify_export(source.model, exported, chunk_size)
    for precision in wanted:
        if precision != "fp32":
            quantize_export(exported, precision, settings, {*kept.get(precision, ())})
    seconds = time.perf_counter() - begin
    sizes = {precision: exported.size(precision) for precision in wanted}
    description = {
        "made_of": made_of,
        "checkpoint": str(source.checkpoint),
        "dims": source.model.dims.to_dict(),
        "difference_from_torch": difference,
        "bytes": sizes,
        "files": {path.name: file_facts(path) for path in exported.files(wanted)},
        "provenance": provenance(),
    }
    atomic.write_text(exported.description, json.dumps(description, indent=2) + "\n")
    kilobytes = ", ".join(f"{name} {size / 1000:.0f} kB" for name, size in sizes.items())
    log.info(
        "%s: %s, differs from torch by %.1g, %.1f s", exported.dir, kilobytes, difference, seconds
    )


def kept_layers(
    experiment: Experiment, exported: Exported, checkpoint: str
) -> dict[str, list[str]]:
    """The layers of a tier that `icetransfer.remedy` has found to need a higher precision.

    Args:
        experiment: whose tier it is.
        exported: the tier.
        checkpoint: its SHA-256; what was found for another is not heeded.
    """
    if not experiment.remedy_file.is_file():
        return {}
    found = read_json(experiment.remedy_file, ["checkpoint_sha256", "rows"])
    if found["checkpoint_sha256"] != checkpoint:
        log.warning("%s is of another checkpoint: run it again", experiment.remedy_file)
        return {}
    return {
        row["precision"]: row["kept"] for row in found["rows"] if row["tier"] == exported.dir.name
    }


def export_tiers(experiment: Experiment) -> None:
    """Exports every tier of the config.

    Raises:
        ValueError: something that an earlier stage makes is missing.
    """
    torch.set_num_threads(1)
    decode = experiment.config.decode
    source = Source.load(experiment.averaged_checkpoint, experiment.lang_dir / "tokens.txt")
    left, precisions, heads = decode.left_context_frames, decode.precisions, None
    for size in decode.chunk_sizes:
        exported = Exported(experiment.onnx_dir(size))
        kept = kept_layers(experiment, exported, source.sha256)
        settings = experiment.config.export
        export_tier(source, exported, size, left, precisions, heads, settings, kept)
        heads = exported
    write_provenance(experiment, "export", checkpoint_sha256=source.sha256)


@dataclass(frozen=True)
class Arguments:
    """The standalone command's own keys; any other but export.* is for `load_transducer`."""

    checkpoint: str
    tokens: str
    out: str
    chunk_size: str = "16"
    left_context_frames: str = "128"
    precisions: str = "fp32,int8"


def _parse(words: list[str]) -> tuple[Arguments, dict[str, str]]:
    given = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not value:
            raise ValueError(f"expected key=value (as in chunk_size=16), got {word!r}")
        given[key] = value
    own = {field: given.pop(field) for field in Arguments.__dataclass_fields__ if field in given}
    missing = [key for key in ("checkpoint", "tokens", "out") if key not in own]
    if missing:
        raise ValueError(
            f"{', '.join(f'{key}=' for key in missing)} not given\n"
            "usage: python -m icetransfer.export checkpoint=F.pt tokens=tokens.txt out=DIR "
            "chunk_size=16 left_context_frames=128 precisions=fp32,int8"
        )
    return Arguments(**own), given


def _numbers(key: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"{key}={text}: expected whole numbers, as in {key}=16") from None


def export_checkpoint(words: list[str]) -> None:
    """The standalone command: its key=value words as given."""
    settings = load_section(Export, "export", [w for w in words if w.startswith("export.")])
    arguments, overrides = _parse([w for w in words if not w.startswith("export.")])
    precisions = arguments.precisions.split(",")
    if unknown := sorted({*precisions} - {*get_args(Precision)}):
        raise ValueError(
            f"precisions={arguments.precisions}: {unknown[0]!r} is none of "
            f"{', '.join(get_args(Precision))}"
        )
    left = _numbers("left_context_frames", arguments.left_context_frames)
    sizes = _numbers("chunk_size", arguments.chunk_size)
    if len(left) != 1 or left[0] < 1:
        raise ValueError(
            f"left_context_frames={arguments.left_context_frames}: expected one number of 50 Hz "
            "frames above 0"
        )
    torch.set_num_threads(1)
    source = Source.load(Path(arguments.checkpoint), Path(arguments.tokens), **overrides)
    out = Path(arguments.out)
    tiers = {size: Exported(out) for size in sizes}
    if len(sizes) > 1:
        tiers = {size: Exported(out / tier_folder(size, left[0])) for size in sizes}
    heads = None
    for size, exported in tiers.items():
        export_tier(source, exported, size, left[0], precisions, heads, settings)
        heads = exported
    log.info("next: python -m icetransfer.transcribe --bundle %s FILE...", out)


def _main() -> None:
    standalone: Callable[[], None] = lambda: export_checkpoint(sys.argv[1:])  # noqa: E731
    if any("=" in word for word in sys.argv[1:]) and "--exp" not in sys.argv:
        main(standalone)
    else:
        run_stage(__doc__, export_tiers)


if __name__ == "__main__":
    _main()
