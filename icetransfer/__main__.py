"""`python -m icetransfer`: every command, a line each; `python -m icetransfer COMMAND` runs one.

`pip install -e .` gives the same under the name `icetransfer`: `icetransfer transcribe ...` is
`python -m icetransfer.transcribe ...`.
"""

import ast
import difflib
import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent
STAGES = (
    *("data.download", "data.corpora", "data.features", "data.subset", "data.tokenizer"),
    *("transfer", "train", "average", "export", "decode", "score", "pack"),
)
BESIDE = (
    *("config", "experiment", "look", "sweep", "report", "gap", "recommend"),
    *("language_model", "robustness", "transcribe", "serve", "long_recordings", "remedy"),
    *("model_card", "new_recipe", "doctor"),
)


def summary(command: str) -> str:
    """What a command says of itself in its docstring's first line; nothing is imported."""
    path = PACKAGE / f"{command.replace('.', '/')}.py"
    if not path.is_file():
        path = path.with_suffix("") / "__main__.py"
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.splitlines()[0]


def line(command: str) -> str:
    """A command and what it says of itself, in 80 columns."""
    indent = " " * 18
    return textwrap.fill(
        summary(command), 80, initial_indent=f"  {command:<16}", subsequent_indent=indent
    )


def lines() -> Iterator[str]:
    """The text that is printed, line by line."""
    yield "usage: icetransfer COMMAND ..., or python -m icetransfer.COMMAND ..."
    yield "       --help after a command shows its options and two examples"
    yield ""
    yield "The stages of a recipe, which egs/<lang>/run.sh runs:"
    yield from map(line, STAGES)
    yield ""
    yield "Beside them:"
    yield from map(line, BESIDE)


def main() -> None:
    """Prints the commands, or becomes the one that is named first."""
    words = sys.argv[1:]
    if not words or words[0] in ("--help", "-h"):
        print("\n".join(lines()))
        return
    command, known = words[0], [*STAGES, *BESIDE]
    if command not in known:
        near = difflib.get_close_matches(command, known, 1)
        hint = f"did you mean {near[0]}?" if near else "icetransfer --help lists them"
        print(f"error: {command} is not a command; {hint}", file=sys.stderr)
        sys.exit(2)
    os.execv(sys.executable, [sys.executable, "-m", f"icetransfer.{command}", *words[1:]])


if __name__ == "__main__":
    main()
