"""Encoders of several latency tiers that share the weights on disk.

The tiers of a model differ in their graphs, in the tables of positions and in the sizes that depend
on the chunk; all else, 98 % of a large encoder, is the same.  sherpa-onnx reads the chunk from the
metadata of the file and allots the caches by it, so that each tier needs a graph of its own.  What
the graphs have in common is put into one file beside them (ONNX external data), of which the folder
of every tier has a hard link: onnxruntime refuses weights outside the folder of the model, be it by
`..` or by a symbolic link.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
from onnx import TensorProto

from icetransfer.onnx.quantize import same_file
from icetransfer.stage import atomic
from icetransfer.streaming.exported import Exported

WORTH_SHARING = 256  # bytes of a constant; a reference to it takes 75
ALIGNMENT = 64  # of a constant in the file, in bytes

Key = tuple[int, bytes]  # type and bytes of a constant; shapes are the graphs' own


def share_weights(tiers: Mapping[Exported, Exported], precision: str) -> bool:
    """Writes the encoders of tiers so that they share a file of weights, if that is smaller.

    Args:
        tiers: an export of each tier -> where its encoder and the weights go; the exports stay as
            they are.
        precision: "fp32", "int8", ...

    Returns:
        Whether it was done; if not, nothing is left at the targets.
    """
    sources = [tier.model("encoder", precision) for tier in tiers]
    counts: Counter[Key] = Counter()
    for source in sources:
        counts.update({*_constants(onnx.load(str(source)))})
    shared = [key for key, count in counts.items() if count > 1]
    made = [*tiers.values()]
    first, *others = [target.weights(precision) for target in made]
    places = _write_weights(shared, first)
    for other in others:
        same_file(first, other)
    for source, target in zip(sources, made, strict=True):
        encoder = onnx.load(str(source))
        for tensor, key in zip(encoder.graph.initializer, _keys(encoder), strict=True):
            if key in places:
                _point_to(tensor, first.name, places[key], len(key[1]))
        with atomic.atomic_path(target.model("encoder", precision)) as temporary:
            temporary.write_bytes(encoder.SerializeToString())
    files = [path for t in made for path in (t.model("encoder", precision), t.weights(precision))]
    if bytes_on_disk(files) < bytes_on_disk(sources):
        return True
    for path in files:
        path.unlink()
    return False


def bytes_on_disk(paths: Sequence[Path]) -> int:
    """The sizes of files together, hard links of one file counted once."""
    stats = [path.stat() for path in paths]
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}.values())


def _keys(model: onnx.ModelProto) -> list[Key | None]:
    """What tells each constant from others; None for those that stay in the graph."""
    return [
        (tensor.data_type, tensor.raw_data) if len(tensor.raw_data) >= WORTH_SHARING else None
        for tensor in model.graph.initializer
    ]


def _constants(model: onnx.ModelProto) -> list[Key]:
    return [key for key in _keys(model) if key is not None]


def _write_weights(keys: Sequence[Key], target: Path) -> dict[Key, int]:
    """Writes constants one after the other; where each begins."""
    places = {}
    with atomic.atomic_path(target) as temporary, temporary.open("wb") as file:
        for key in keys:
            file.write(bytes(-file.tell() % ALIGNMENT))
            places[key] = file.tell()
            file.write(key[1])
    return places


def _point_to(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    """Replaces a constant's bytes by where they lie in a file beside the graph."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
