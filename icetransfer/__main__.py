"""`python -m icetransfer`: every command, a line each, in the order of the stages."""

import ast
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


def lines() -> Iterator[str]:
    """The text that is printed, line by line."""
    yield "usage: python -m icetransfer.<command> --help"
    yield ""
    yield "The stages of a recipe, which egs/<lang>/run.sh runs:"
    for command in STAGES:
        yield f"  {command:<16}{summary(command)}"
    yield ""
    yield "Beside them:"
    for command in BESIDE:
        yield f"  {command:<16}{summary(command)}"


if __name__ == "__main__":
    print("\n".join(lines()))
