"""Checkpoints: icefall's and ours, read safely, with the architecture told by the weights.

A checkpoint of ours is icefall's dictionary (`model`, and what training adds) with one more entry,
`icetransfer`, that holds the dimensions.  For icefall's own files the dimensions are read from the
shapes of the parameters; only the split of the attention into heads cannot be, see `_head_dims`.
"""

import dataclasses
import difflib
import pathlib
import pickle
import re
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from icetransfer.model.adapters import plain_state
from icetransfer.model.transducer import TransducerDims, TransducerModel
from icetransfer.stage import atomic

FORMAT = 1
METADATA = "icetransfer"

# Every flag that shapes the network, in icefall's words.
ARCHITECTURE_FLAGS = {f.name for f in dataclasses.fields(TransducerDims)} - {"chunk_sizes"}
ARCHITECTURE_FLAGS |= {"chunk_size"}
# Flags of icefall's that can have one value here, and one that matters to its training alone.
FIXED_FLAGS = {"causal": 1, "use_transducer": 1, "feature_dim": 80, "blank_id": 0}
IGNORED_FLAGS = {"encoder_unmasked_dim"}

# What shapes do not tell, in icefall's flag names, with icefall's defaults.
ICEFALL_DEFAULTS = {
    "num_heads": "4,4,4,8,4,4",
    "query_head_dim": "32",
    "value_head_dim": "12",
    "pos_head_dim": "4",
    "chunk_size": "16,32,64,-1",
    "left_context_frames": "64,128,256,-1",
}
HEAD_FLAGS = ("query_head_dim", "value_head_dim", "pos_head_dim")

# icefall's training checkpoints hold paths and a version; these classes only ever wrap strings.
# Python 3.13 and Windows name the classes of paths differently.
SAFE_CLASSES: list[Any] = [
    torch.torch_version.TorchVersion,
    *(
        (getattr(pathlib, f"Pure{system}Path"), f"{module}.{pure}{system}Path")
        for module in ("pathlib", "pathlib._local")
        for pure in ("", "Pure")
        for system in ("Posix", "Windows")
    ),
]


class DamagedError(ValueError):
    """The file is not whole, or was changed on its way."""


class Checkpoint(NamedTuple):
    """What a checkpoint file holds.

    Attributes:
        dims: the architecture.
        state_dict: the weights, float32, without a DDP prefix.
        extra: all other entries of the file.
    """

    dims: TransducerDims
    state_dict: dict[str, Tensor]
    extra: dict[str, Any]


def load_transducer(
    path: Path | str, *, trusted: bool = False, **overrides: str | int
) -> TransducerModel:
    """Loads an icefall or icetransfer checkpoint as a model on the CPU, in evaluation mode.

    Args:
        path: the .pt file.
        trusted: run whatever code the file's pickle asks for; only for files whose origin you know.
        overrides: under icefall's flag names, what shapes do not tell (`num_heads`,
            `query_head_dim`, `value_head_dim`, `pos_head_dim`, `chunk_size`,
            `left_context_frames`): comma lists, one number a stack, or one number for all.  Other
            flags of the architecture may be given, and must then agree with the shapes.

    Raises:
        ValueError: not a checkpoint, another model family, or dimensions that contradict the
            shapes; the message says which.
        DamagedError: the file is cut short or its contents do not have their checksums.
    """
    checkpoint = read_checkpoint(path, trusted=trusted, **overrides)
    model = TransducerModel(checkpoint.dims)
    load_weights(model, checkpoint.state_dict, Path(path))
    return model.eval()


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Copies weights into a model that they must fit exactly.

    Raises:
        ValueError: an entry is missing, superfluous or of another shape.
    """
    own = model.state_dict()
    problems = [f"{name} is missing" for name in own if name not in weights]
    problems += [f"{name} has no place in the model" for name in weights if name not in own]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if problems:
        raise ValueError(
            f"{path} does not fit the architecture it seems to have ({len(problems)} entries, such "
            f"as: {'; '.join(problems[:3])}); is it a causal Zipformer transducer?"
        )
    model.load_state_dict(dict(weights))


def read_checkpoint(
    path: Path | str, *, trusted: bool = False, **overrides: str | int
) -> Checkpoint:
    """Reads a checkpoint without building the model; arguments and errors of `load_transducer`."""
    path = Path(path)
    overrides = {flag: v for flag, v in overrides.items() if flag not in IGNORED_FLAGS}
    if unknown := sorted(set(overrides) - ARCHITECTURE_FLAGS - set(FIXED_FLAGS)):
        near = difflib.get_close_matches(unknown[0], ARCHITECTURE_FLAGS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"unknown dimension {unknown[0]}{hint} (expected some of {sorted(ARCHITECTURE_FLAGS)})"
        )
    content = _load_file(path, trusted)
    nested = isinstance(content.get("model"), Mapping)
    weights = _weights(content["model"] if nested else content)
    extra = {key: value for key, value in content.items() if key != "model"} if nested else {}
    _check_family(path, weights)
    weights = {n: v for n, v in weights.items() if not n.startswith("attention_decoder.")}
    metadata = extra.pop(METADATA, None)
    if metadata is not None:
        dims = _recorded_dims(path, metadata)
    else:
        recorded = {key: str(extra[key]) for key in ICEFALL_DEFAULTS if extra.get(key) is not None}
        given = {key: str(value) for key, value in overrides.items() if key in ICEFALL_DEFAULTS}
        dims = infer_dims(path, weights, recorded | given)
    _check_overrides(path, dims, overrides)
    return Checkpoint(dims, weights, extra)


def save_checkpoint(path: Path, model: TransducerModel, **extra: Any) -> None:
    """Writes the model, its dimensions and `extra` entries; whole or not at all.

    Args:
        path: the .pt file; `read_checkpoint` reads it back.
        model: its parameters are written as they are, adapters merged into the weights.
        extra: tensors, numbers, strings, and lists and dictionaries of them.

    Raises:
        FullDiskError: it could not be written; a file of that name is as it was.
    """
    content = {
        "model": plain_state(model),
        METADATA: {"format": FORMAT, "dims": model.dims.to_dict()},
        **extra,
    }
    try:
        with atomic.atomic_path(path) as temporary:
            torch.save(content, temporary)
    except RuntimeError as error:
        # torch's file writer says so when the disk is full. Any other is not about the file: the
        # one of a data loading process that died comes out of whatever runs just then.
        if "inline_container" not in str(error):
            raise
        raise atomic.FullDiskError(path, str(error).splitlines()[0]) from error


def _load_file(path: Path, trusted: bool) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist or is not a file")
    _check_kind(path)
    try:
        with torch.serialization.safe_globals(SAFE_CLASSES):
            content = torch.load(path, map_location="cpu", weights_only=not trusted)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise DamagedError(
                f"{path} is not a PyTorch checkpoint, or is damaged: fetch or make it again"
            ) from None
        raise ValueError(
            f"{path} holds a Python object besides weights ({refused.group(1)}), and loading such "
            f"objects can run any code; if you know where the file comes from, load it with "
            f"trusted=True (in a recipe: transfer.trusted=true)"
        ) from None
    except Exception as error:  # on arbitrary bytes the unpickler raises whatever it stumbles on
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedError(
            f"{path} is not a PyTorch checkpoint, or is damaged or cut short ({reason}); fetch or "
            f"make it again"
        ) from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a state dict")
    return dict(content)


def _check_kind(path: Path) -> None:
    """Refuses files of other kinds, by their name or content."""
    found = ""
    if path.suffix == ".onnx":
        found = "an ONNX model: give the PyTorch checkpoint that it was made from"
    elif path.suffix == ".safetensors":
        found = "a safetensors file: give the .pt checkpoint of an icefall Zipformer"
    elif path.suffix == ".nemo" or tarfile.is_tarfile(path):
        found = "a NeMo model or another archive, not an icefall Zipformer"
    elif zipfile.is_zipfile(path):
        names, damage = _read_archive(path)
        if damage:
            raise DamagedError(f"{path} is damaged: {damage}; fetch or make it again")
        if any(name.endswith("/constants.pkl") for name in names):
            found = "a TorchScript program: give the checkpoint that it was made from"
    if found:
        raise ValueError(f"{path} is {found}")


def _read_archive(path: Path) -> tuple[list[str], str]:
    """The names in a zip archive, and what is not as it was written; torch.load does not look."""
    try:
        with zipfile.ZipFile(path) as archive:
            entry = archive.testzip()
            damage = f"its entry {entry} does not have the recorded checksum" if entry else ""
            return archive.namelist(), damage
    except Exception as error:  # zipfile trusts the directory: damaged, it raises whatever it meets
        return [], f"its directory cannot be read ({str(error) or type(error).__name__})"


def _weights(entries: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors, without DDP's prefix, floating point ones as float32."""
    return {
        str(name).removeprefix("module."): value.float() if value.is_floating_point() else value
        for name, value in entries.items()
        if isinstance(value, Tensor)
    }


def _check_family(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Refuses what is not a causal Zipformer transducer, by what it is where that can be told."""
    names = weights.keys()

    def has(*parts: str) -> bool:
        return all(any(part in name for name in names) for part in parts)

    if not names:
        found = "no weights"
    elif has("encoder.encoder_embed.", "encoder.encoders."):
        found = "a Zipformer of the first generation (pruned_transducer_stateless7)"
    elif has("encoder.pre_encode."):
        found = "a NeMo FastConformer"
    elif any(name.startswith(("encoder.encoder.layers.", "encoder.layers.")) for name in names):
        found = "a Conformer or a Transformer"
    elif has("encoder_embed.conv.0.weight", "encoder.encoders.0."):
        if not has("depthwise_conv.causal_conv."):
            found = "a Zipformer without causal convolutions (trained without --causal 1)"
        elif not has("joiner.", "decoder."):
            found = "a Zipformer without decoder and joiner (CTC only)"
        else:
            return
    else:
        found = f"another model, with parameters such as {sorted(names)[:3]}"
    raise ValueError(f"{path} holds {found}; expected a causal Zipformer transducer of icefall's")


def _recorded_dims(path: Path, metadata: Mapping[str, Any]) -> TransducerDims:
    dims = metadata.get("dims") if isinstance(metadata, Mapping) else None
    if not isinstance(dims, Mapping):
        raise ValueError(
            f"{path} does not say the model's dimensions: it is damaged, make it again"
        )
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} is of checkpoint format {metadata.get('format')}, expected {FORMAT}: use the "
            f"version of icetransfer that wrote it"
        )
    try:
        return TransducerDims.from_dict(dims)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _check_overrides(path: Path, dims: TransducerDims, overrides: Mapping[str, str | int]) -> None:
    """Holds what the user gave against what the file tells."""
    for flag, value in overrides.items():
        field = "chunk_sizes" if flag == "chunk_size" else flag
        own = FIXED_FLAGS[flag] if flag in FIXED_FLAGS else getattr(dims, field)
        listed = own if isinstance(own, tuple) else (int(own),)
        if _numbers(path, flag, str(value), len(listed)) != listed:
            shown = ",".join(map(str, listed))
            raise ValueError(f"{flag}={value} contradicts {path}, whose {flag} is {shown}")


def _numbers(path: Path, flag: str, text: str, count: int) -> tuple[int, ...]:
    """Parses a comma list; one number stands for `count` of them."""
    try:
        listed = text.replace("True", "1").replace("False", "0").strip("()[]").split(",")
        numbers = tuple(int(part) for part in listed if part.strip())
    except ValueError:
        raise ValueError(f"{flag}={text!r}: expected a comma list of numbers") from None
    if flag in ("chunk_size", "left_context_frames"):  # lists of their own length
        return numbers
    if len(numbers) == 1:
        return numbers * count
    if len(numbers) != count:
        raise ValueError(
            f"{flag}={text} has {len(numbers)} numbers, but {path} has {count} encoder stacks"
        )
    return numbers


def infer_dims(
    path: Path, weights: Mapping[str, Tensor], given: Mapping[str, str]
) -> TransducerDims:
    """Reads the architecture from the shapes of the parameters.

    Args:
        path: named in errors.
        weights: the state dict.
        given: what is known of `ICEFALL_DEFAULTS`' flags.

    Raises:
        ValueError: a flag contradicts the shapes, or the heads cannot be told.
    """
    stacks = _stack_prefixes(weights)

    def shape(name: str) -> tuple[int, ...]:
        if name not in weights:
            raise ValueError(
                f"{path} has no parameter {name}; is it a causal Zipformer transducer?"
            )
        return tuple(weights[name].shape)

    firsts = [prefixes[0] for prefixes in stacks]
    heads = _head_dims(path, [_projections(shape, first) for first in firsts], given)
    downsample = [f"encoder.encoders.{i}.downsample.bias" for i in range(len(stacks))]
    conv = "decoder.conv.weight"
    vocab_size, decoder_dim = shape("decoder.embedding.weight")
    lists = {
        flag: _numbers(path, flag, given.get(flag, ICEFALL_DEFAULTS[flag]), 0)
        for flag in ("chunk_size", "left_context_frames")
    }
    return TransducerDims(
        num_encoder_layers=tuple(len(prefixes) for prefixes in stacks),
        downsampling_factor=tuple(shape(n)[0] if n in weights else 1 for n in downsample),
        encoder_dim=tuple(shape(f"{first}norm.bias")[0] for first in firsts),
        feedforward_dim=tuple(shape(f"{first}feed_forward2.in_proj.bias")[0] for first in firsts),
        cnn_module_kernel=tuple(
            shape(f"{first}conv_module1.depthwise_conv.chunkwise_conv.weight")[2]
            for first in firsts
        ),
        pos_dim=shape(f"{firsts[0]}self_attn_weights.linear_pos.weight")[1],
        vocab_size=vocab_size,
        decoder_dim=decoder_dim,
        joiner_dim=shape("joiner.encoder_proj.weight")[0],
        context_size=shape(conv)[2] if conv in weights else 1,
        subsampling_channels=tuple(shape(f"encoder_embed.conv.{i}.bias")[0] for i in (0, 4, 7)),
        use_ctc="ctc_output.1.weight" in weights,
        chunk_sizes=lists["chunk_size"],
        left_context_frames=lists["left_context_frames"],
        **heads,
    )


def _stack_prefixes(weights: Mapping[str, Tensor]) -> list[list[str]]:
    """For each stack the key prefixes of its layers, "encoder.encoders.1.encoder.layers.0."."""
    stacks: list[list[str]] = []
    while True:
        stack = f"encoder.encoders.{len(stacks)}."
        names = [name for name in weights if name.startswith(stack) and ".layers." in name]
        if not names:
            return stacks
        before = names[0].partition("layers.")[0]
        numbers = {int(name.partition("layers.")[2].partition(".")[0]) for name in names}
        stacks.append([f"{before}layers.{number}." for number in sorted(numbers)])


class _Projections(NamedTuple):
    """Output sizes of a stack's attention projections, over all heads."""

    query: int  # H * Q
    pos: int  # H * P
    value: int  # H * V


def _projections(shape: Any, prefix: str) -> _Projections:
    pos = shape(f"{prefix}self_attn_weights.linear_pos.weight")[0]
    both = shape(f"{prefix}self_attn_weights.in_proj.weight")[0]  # H * (2Q + P)
    return _Projections((both - pos) // 2, pos, shape(f"{prefix}self_attn1.in_proj.weight")[0])


def _head_dims(
    path: Path, stacks: Sequence[_Projections], given: Mapping[str, str]
) -> dict[str, tuple[int, ...]]:
    """Splits the attention projections into heads.

    The shapes tell the products (heads x head dim), so one factor settles the others.  It is
    `num_heads` where given, else a given head dim, else icefall's default `query_head_dim`.  All
    that is given, and without anything given icefall's default `num_heads`, must agree with it:
    a wrong split would load without a complaint and compute nonsense.
    """
    count = len(stacks)
    totals = {
        "query_head_dim": tuple(stack.query for stack in stacks),
        "value_head_dim": tuple(stack.value for stack in stacks),
        "pos_head_dim": tuple(stack.pos for stack in stacks),
    }
    flags = {
        flag: _numbers(path, flag, given[flag], count)
        for flag in ("num_heads", *HEAD_FLAGS)
        if flag in given
    }
    if not flags:
        default = "num_heads" if count == 6 else "query_head_dim"
        flags = {
            flag: _numbers(path, flag, ICEFALL_DEFAULTS[flag], count)
            for flag in (default, *HEAD_FLAGS)
        }
        origin = "icefall's defaults"
    else:
        origin = "what was given"
    if "num_heads" in flags:
        heads = flags["num_heads"]
    else:
        flag = next(name for name in HEAD_FLAGS if name in flags)
        heads = tuple(
            total // dim if dim > 0 and total % dim == 0 else 0
            for total, dim in zip(totals[flag], flags[flag], strict=True)
        )
    found: dict[str, tuple[int, ...]] = {"num_heads": heads}
    for flag, total in totals.items():
        if any(h < 1 or t % h for h, t in zip(heads, total, strict=True)):
            found[flag] = ()
        else:
            found[flag] = tuple(t // h for h, t in zip(heads, total, strict=True))
    wrong = [flag for flag, numbers in found.items() if numbers != flags.get(flag, numbers)]
    wrong += [flag for flag, numbers in found.items() if not numbers or 0 in numbers]
    if wrong:
        sizes = "; ".join(
            f"num_heads x {flag} is {','.join(map(str, total))}" for flag, total in totals.items()
        )
        listed = ", ".join(f"{flag}={','.join(map(str, n))}" for flag, n in flags.items())
        raise ValueError(
            f"{path}: {origin} ({listed}) contradicts the shapes of the weights in "
            f"{', '.join(dict.fromkeys(wrong))}: by the shapes, stack by stack, {sizes}. Pass the "
            f"num_heads that the model was trained with"
        )
    return found
