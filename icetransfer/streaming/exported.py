"""What stage 8 exports: a folder with an encoder, a decoder, a joiner and `tokens.txt`.

It is what sherpa-onnx loads, one folder for each latency tier, with one set of files for each
precision: `encoder.onnx` (fp32), `encoder.int8.onnx`, ...  Before a runtime gets the files they are
checked here: a runtime would end the process, or recognise nonsense without a word.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import onnx

from icetransfer.experiment import log
from icetransfer.stage import atomic
from icetransfer.stage.json_file import read_json
from icetransfer.stage.stamp import sha256
from icetransfer.stage.text import read_text
from icetransfer.streaming.metadata import Sizes, check_encoder, numbers_of

PARTS = ("encoder", "decoder", "joiner")


@dataclass(frozen=True)
class Exported:
    """The files of an export."""

    dir: Path

    @property
    def tokens(self) -> Path:
        """One "token id" a line; blank first."""
        return self.dir / "tokens.txt"

    @property
    def description(self) -> Path:
        """What was exported from what, and how well the graphs agree with torch."""
        return self.dir / "export.json"

    def model(self, part: str, precision: str) -> Path:
        """The ONNX file of "encoder", "decoder" or "joiner"."""
        suffix = "" if precision == "fp32" else f".{precision}"
        return self.dir / f"{part}{suffix}.onnx"

    def models(self, precision: str) -> dict[str, Path]:
        """The three ONNX files of a precision, by part."""
        return {part: self.model(part, precision) for part in PARTS}

    def files(self, precisions: Iterable[str]) -> list[Path]:
        """The ONNX files of precisions, and tokens.txt."""
        return [*(f for p in precisions for f in self.models(p).values()), self.tokens]

    def size(self, precision: str) -> int:
        """Bytes of the three ONNX files of a precision."""
        return sum(path.stat().st_size for path in self.models(precision).values())

    def quantisation(self, precision: str) -> dict[str, Any]:
        """How the files of a precision were made, with the layers that were kept out of it."""
        if not self.description.is_file():
            return {}
        made_of = read_json(self.description, ["made_of"])["made_of"]
        settings = made_of.get("export", {})
        if precision not in settings:
            return {}  # fp32 and fp16 have none
        shared = {key: value for key, value in settings.items() if not isinstance(value, dict)}
        return {**settings[precision], **shared, "kept": made_of["kept"].get(precision, [])}

    def check(self, precision: str) -> None:
        """Checks that nothing is missing and that all files are those that were exported here.

        Raises:
            ValueError: a file is missing, cut short, or of another export.
        """
        files = self.files([precision])
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise ValueError(
                f"{self.dir} has no {precision} models: {', '.join(missing)} missing; "
                f"run stage 8 (python -m icetransfer.export), with {precision} in its precisions"
            )
        if not self.description.is_file():
            return  # exported by others: `inspect` sees what the files say of themselves
        exported = read_json(self.description, ()).get("files", {})
        for path in files:
            wanted, size = exported.get(path.name), path.stat().st_size
            if wanted and size != wanted["bytes"]:
                raise ValueError(
                    f"{path} has {size} bytes and {self.description} says {wanted['bytes']}: it is "
                    f"cut short or of another export; copy it again, or run stage 8 again"
                )
            if wanted and sha256(path) != wanted["sha256"]:
                raise ValueError(
                    f"{path} is not the file that {self.description} tells of: it is of another "
                    f"tier or model, or damaged; copy it again, or run stage 8 again"
                )

    def inspect(self, precision: str) -> "Facts":
        """Checks the files, also by what they say of themselves, and tells what they are.

        Raises:
            ValueError: as `check` does; or a file is no ONNX model, is of another model family, or
                does not fit the others.
        """
        self.check(precision)
        files = self.models(precision)
        graphs = {part: _read_graph(path) for part, path in files.items()}
        encoder, decoder = graphs["encoder"].metadata, graphs["decoder"].metadata
        if encoder.get("model_type") != "zipformer2":
            raise ValueError(
                f"{files['encoder']}: model_type is {encoder.get('model_type')!r} in its metadata, "
                f"expected 'zipformer2': it is of another model family"
            )
        (vocab_size,) = numbers_of(files["decoder"], decoder, "vocab_size", 1)
        (context_size,) = numbers_of(files["decoder"], decoder, "context_size", 1)
        (joiner_dim,) = numbers_of(files["joiner"], graphs["joiner"].metadata, "joiner_dim", 1)
        if ("y", 1, context_size) not in graphs["decoder"].sizes:
            raise ValueError(
                f"{files['decoder']}: its input is not of the context_size of {context_size} that "
                f"its metadata has; export again"
            )
        sizes = {
            "encoder": (graphs["encoder"].width, joiner_dim),
            "decoder": (graphs["decoder"].width, joiner_dim),
            "joiner": (graphs["joiner"].width, vocab_size),
        }
        for part, (width, expected) in sizes.items():
            if width != expected:
                raise ValueError(
                    f"{files[part]} has {width} outputs, {expected} were expected by the other "
                    f"files: they are of different models; export again"
                )
        check_vocabulary(read_tokens(self.tokens), self.tokens, vocab_size, files["decoder"])
        if "x_lens" in {name for name, _, _ in graphs["encoder"].sizes}:
            return Facts(-1, -1, vocab_size, context_size)
        chunk, left = check_encoder(files["encoder"], encoder, graphs["encoder"].sizes)
        return Facts(chunk, left, vocab_size, context_size)


@dataclass(frozen=True)
class Facts:
    """What the graphs of an export are for; chunk_size -1 is offline."""

    chunk_size: int
    left_context_frames: int
    vocab_size: int
    context_size: int


def file_facts(path: Path) -> dict[str, Any]:
    """A file's size and checksum, as the description of an export holds them."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


class _Graph(NamedTuple):
    metadata: dict[str, str]
    width: int  # of the last axis of the first output
    sizes: Sizes


def _read_graph(path: Path) -> _Graph:
    try:
        proto = onnx.load(str(path), load_external_data=False)
        shape = proto.graph.output[0].type.tensor_type.shape
        width = shape.dim[-1].dim_value
    except Exception as error:  # protobuf's DecodeError, of one of its several packages
        raise ValueError(
            f"{path} is not a whole ONNX model ({error}); copy it again, or export it again"
        ) from error
    sizes = {
        (given.name, axis, dim.dim_value)
        for given in proto.graph.input
        for axis, dim in enumerate(given.type.tensor_type.shape.dim)
    }
    return _Graph({str(item.key): str(item.value) for item in proto.metadata_props}, width, sizes)


def read_tokens(path: Path) -> list[str]:
    """Reads `tokens.txt`: a line for each token, "token id", ids 0, 1, 2, ... and blank first.

    icefall's lang folders end theirs with disambiguation symbols, `#0` and `#1`, which only its
    decoding graphs have and no model: they are left out.  A token may be white space of any kind.

    Returns:
        The tokens in the order of their ids.

    Raises:
        ValueError: the file is missing, a line is not "token id", or the ids are not as above.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected the tokens.txt of the model")
    tokens = []
    # Not splitlines() or strip(): U+0085, U+2028 and U+3000 are tokens of some models.
    for number, line in enumerate(read_text(path).rstrip("\n").split("\n")):
        found = re.fullmatch(r"([^\n]+?)[ \t]+(\d+)[ \t]*", line)
        if not found or found[2] != str(number):
            raise ValueError(f'{path}:{number + 1}: expected "token {number}", got {line!r}')
        tokens.append(found[1])
    if not tokens or tokens[0] not in ("<blk>", "<blank>", "<eps>"):
        raise ValueError(f'{path}:1: the first token must be blank, "<blk> 0"')
    of_model = _without_disambiguation(tokens)
    if symbols := len(tokens) - len(of_model):
        log.info("%s: the last %d, from #0 on, are not tokens of the model", path, symbols)
    return of_model


def _without_disambiguation(tokens: list[str]) -> list[str]:
    """Leaves out #0, #1, ... at the end of a list."""
    if "#0" not in tokens:
        return tokens
    start = tokens.index("#0")
    expected = [f"#{number}" for number in range(len(tokens) - start)]
    return tokens[:start] if tokens[start:] == expected else tokens


def write_tokens(tokens: list[str], path: Path) -> None:
    """Writes what `read_tokens` reads and sherpa-onnx loads."""
    atomic.write_text(path, "".join(f"{token} {number}\n" for number, token in enumerate(tokens)))


def check_vocabulary(tokens: list[str], path: Path, vocab_size: int, model: Path) -> None:
    """Checks that a token list belongs to a model, as far as numbers tell.

    Raises:
        ValueError: the model has another vocabulary.
    """
    if len(tokens) != vocab_size:
        raise ValueError(
            f"{path} has {len(tokens)} tokens and {model} has {vocab_size}: they are not of the "
            f"same model; give the tokens.txt that the model was trained with"
        )
