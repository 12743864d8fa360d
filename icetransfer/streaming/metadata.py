"""What an ONNX file says of itself, held against its graph.

sherpa-onnx allots the states of a stream by the encoder's metadata and does not look whether they
fit: a wrong number there ends the process, or gives nonsense without a word.
"""

import itertools
import re
from collections.abc import Mapping
from pathlib import Path

from icetransfer.model.subsampling import WINDOW_EXTRA

Sizes = set[tuple[str, int, int]]  # name of a graph's input, axis, size; 0 for one that changes

STACK_KEYS = (  # a number for each stack of the encoder
    *("num_encoder_layers", "encoder_dims", "cnn_module_kernels", "left_context_len"),
    *("query_head_dims", "value_head_dims", "num_heads"),
)
LARGEST = 2**31 - 1  # that sherpa-onnx reads


def numbers_of(
    path: Path, metadata: Mapping[str, str], key: str, count: int | None = None
) -> tuple[int, ...]:
    """The numbers of a comma list in a file's metadata, each from 1.

    Args:
        path: of the file, for errors.
        metadata: what it says.
        key: of the list.
        count: how many there must be; None for any but none.

    Raises:
        ValueError: they are not there, or are not so many numbers.
    """
    text = metadata.get(key)
    if text is None:
        raise ValueError(f"{path}: {key} is not in its metadata; export again")
    words = text.split(",")
    numbers = [int(word) for word in words if re.fullmatch("[0-9]{1,10}", word)]
    wanted = len(words) if count is None else count
    if len(numbers) != len(words) or len(words) != wanted or not 0 < min(numbers) <= LARGEST:
        raise ValueError(
            f"{path}: {key} is {text!r} in its metadata, expected {wanted} "
            f"whole number{'s' * (wanted > 1)} above 0; export again"
        )
    return tuple(numbers)


def check_encoder(path: Path, metadata: Mapping[str, str], sizes: Sizes) -> tuple[int, int]:
    """Checks that a streaming encoder's metadata is that of its graph.

    Args:
        path: of the file, for errors.
        metadata: what it says.
        sizes: of the graph's inputs.

    Returns:
        The chunk size and the left context, in 50 Hz frames.

    Raises:
        ValueError: a key is missing, is no number, or does not fit the graph; says which.
    """
    (window,) = numbers_of(path, metadata, "T", 1)
    (step,) = numbers_of(path, metadata, "decode_chunk_len", 1)
    layers = numbers_of(path, metadata, "num_encoder_layers")
    _, dims, kernels, left, query, value, heads = (
        numbers_of(path, metadata, key, len(layers)) for key in STACK_KEYS
    )
    expected = [
        ("T", "x", 1, window),
        ("decode_chunk_len", "x", 1, step + WINDOW_EXTRA),
        ("num_encoder_layers", f"cached_key_{sum(layers) - 1}", 0, left[-1]),
    ]
    stacks = itertools.chain.from_iterable(itertools.repeat(i, n) for i, n in enumerate(layers))
    for layer, stack in enumerate(itertools.islice(stacks, len(sizes))):
        expected += [
            ("left_context_len", f"cached_key_{layer}", 0, left[stack]),
            ("query_head_dims x num_heads", f"cached_key_{layer}", 2, query[stack] * heads[stack]),
            ("value_head_dims x num_heads", f"cached_val1_{layer}", 2, value[stack] * heads[stack]),
            ("encoder_dims", f"cached_conv1_{layer}", 1, dims[stack]),
            ("cnn_module_kernels", f"cached_conv1_{layer}", 2, kernels[stack] // 2),
        ]
    if f"cached_key_{sum(layers)}" in {name for name, _, _ in sizes}:
        raise ValueError(f"{path}: its graph has more layers than num_encoder_layers={layers} says")
    for key, name, axis, size in expected:
        if (name, axis, size) not in sizes:
            raise ValueError(
                f"{path}: {key} in its metadata does not fit its graph, whose input {name} does "
                f"not have the size {size} on axis {axis}; export again"
            )
    return step // 2, max(left)  # the stack that is not downsampled has the most
