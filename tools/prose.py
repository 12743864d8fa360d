"""Checks the prose that users read: spelling by codespell, and words that are not to come back.

    python tools/prose.py

Reads documents, scripts, and of the code the docstrings of modules (they are --help), the strings
(messages) and the lines of config keys.  Exit code 1 when something is found.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
#: What a native reader stumbles over, and what to write.
BANNED = {
    r"mend(s|ed|ing)?": "fix, repair",
    r"anew": "again",
    r"(is|are) no \w+ (that|which|of)": "is not a",
    r"(has|have|had) not (a|an|any|enough|it|one|the)": "does not have, lacks",
    r"(?<!who )wants? (?!to\b)": "needs, expects",
    r"the (whole )?way (of|from)|the whole way": "the pipeline, every stage",
    r"the least that": "at least, the smallest",
    r"(?<!not )so (many|much)(?! (as|more|less|that))": "a number, N",
}
#: Foreign words in examples, and typing errors that tests and messages show on purpose.
KNOWN_WORDS = "caf,exempel,komma"
DOCUMENTS = ("*.md", "*.sh", "*.cff", "Dockerfile", "requirements.txt", ".github/*")
CODE = ("icetransfer/*.py", "benchmarks/*.py", "tools/*.py")


def tracked(*patterns: str) -> list[Path]:
    """Files under version control."""
    command = ["git", "ls-files", "--", *patterns]
    names = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout
    return [REPO / name for name in names.splitlines() if (REPO / name).is_file()]


def strings(path: Path) -> Iterator[tuple[int, str]]:
    """What a module shows to users: its docstring and its strings, line by line."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            inner.add(node.body[0].value)  # type: ignore[attr-defined]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inner:
            for number, line in enumerate(node.value.splitlines()):
                yield node.lineno + number, line


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """What a file shows to users, each line with its number."""
    if path.suffix == ".py":
        yield from strings(path)
    else:
        yield from enumerate(path.read_text(encoding="utf-8").splitlines(), 1)


def banned(files: list[Path]) -> Iterator[str]:
    """The lines that have a banned word, with what to write instead."""
    patterns = {re.compile(rf"\b(?:{words})", re.I): better for words, better in BANNED.items()}
    for path in files:
        for number, line in lines(path):
            for pattern, better in patterns.items():
                if (found := pattern.search(line)) and path != Path(__file__).resolve():
                    yield f"{path.relative_to(REPO)}:{number}: {found[0]!r}: {better}"


def main() -> None:
    """Prints what is found."""
    files = [*tracked(*DOCUMENTS), *tracked(*CODE)]
    command = [sys.executable, "-m", "codespell_lib", "-L", KNOWN_WORDS, *map(str, files)]
    misspelt = subprocess.run(command, cwd=REPO, check=False).returncode
    found = list(banned(files))
    print(*found, sep="\n", end="\n" if found else "")
    sys.exit(1 if found or misspelt else 0)


if __name__ == "__main__":
    main()
