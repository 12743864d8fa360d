"""An exported bundle: a folder with an encoder, a decoder, a joiner and `tokens.txt`.

It is what sherpa-onnx loads, one folder for each latency tier, with one set of files for each
precision: `encoder.onnx` (fp32), `encoder.int8.onnx`, ...
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PARTS = ("encoder", "decoder", "joiner")


@dataclass(frozen=True)
class Bundle:
    """The files of a bundle."""

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

    def size(self, precision: str) -> int:
        """Bytes of the three ONNX files of a precision."""
        return sum(path.stat().st_size for path in self.models(precision).values())

    def quantisation(self, precision: str) -> dict[str, Any]:
        """How the files of a precision were made, with the layers that were kept out of it."""
        if precision == "fp32" or not self.description.is_file():
            return {}
        made_of = json.loads(self.description.read_text(encoding="utf-8"))["made_of"]
        settings = made_of.get("export", {})
        return {
            **settings.get(precision, {}),
            **{key: value for key, value in settings.items() if not isinstance(value, dict)},
            "kept": made_of.get("kept", {}).get(precision, []),
        }

    def check(self, precision: str) -> None:
        """Checks that nothing is missing.

        Raises:
            ValueError: a file is missing.
        """
        files = [*self.models(precision).values(), self.tokens]
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise ValueError(
                f"{self.dir} is not a {precision} bundle: {', '.join(missing)} missing; "
                f"run stage 8 (python -m icetransfer.export), with {precision} in its precisions"
            )


def read_tokens(path: Path) -> list[str]:
    """Reads `tokens.txt`: a line for each token, "token id", ids 0, 1, 2, ... and blank first.

    Returns:
        The tokens in the order of their ids.

    Raises:
        ValueError: the file is missing, a line is not "token id", or the ids are not as above.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected the tokens.txt of the model")
    tokens = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        token, _, text = line.rstrip().rpartition(" ")
        if not token.strip() or text != str(number):
            raise ValueError(f'{path}:{number + 1}: expected "token {number}", got {line!r}')
        tokens.append(token)
    if not tokens or tokens[0] not in ("<blk>", "<blank>", "<eps>"):
        raise ValueError(f'{path}:1: the first token must be blank, "<blk> 0"')
    return tokens


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
