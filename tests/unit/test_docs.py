"""The documents tell the truth as far as a program can see it: links, files, messages, options."""

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
FOLDERS = ("", "docs/", "benchmarks/", "egs/*/")
DOCUMENTS = sorted(path for folder in FOLDERS for path in REPO.glob(f"{folder}*.md"))
CODE = [*REPO.glob("icetransfer/**/*.py"), *REPO.glob("tools/*.sh"), *REPO.glob("egs/*/run.sh")]


def name(path: Path) -> str:
    return str(path.relative_to(REPO))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_resolve(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not re.match(r"https?:", target):
            assert (document.parent / target).exists(), f"{name(document)} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_files_that_are_named_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:icetransfer|tools|benchmarks|tests|docs|egs)/[\w./-]+)`", text):
        made = path.startswith("egs/cy") or "/exp" in path or "/corpus" in path
        assert made or (REPO / path).exists(), f"{name(document)} names {path}"


@cache
def source() -> str:
    """All code, with the pieces of its string literals joined."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in CODE)
    return re.sub(r'"\s*\n\s*f?"', "", text.replace("\\\n", ""))


def messages() -> list[str]:
    """The words in code font of the first column of troubleshooting.md."""
    text = (REPO / "docs/troubleshooting.md").read_text(encoding="utf-8")
    first = [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]
    return [message for cell in first for message in re.findall(r"`([^`]+)`", cell)]


def test_every_message_of_the_troubleshooting_is_printed_somewhere() -> None:
    assert len(messages()) > 20
    missing = [message for message in messages() if message not in source()]
    assert not missing


def commands() -> list[tuple[str, str]]:
    """Command lines in the documents' code blocks, with the document's name."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8").replace("\\\n", " ")
        blocks = re.findall(r"^```\w*\n(.*?)^```|((?:^    .*\n)+)", text, re.M | re.S)
        for line in "\n".join("".join(block) for block in blocks).splitlines():
            line = line.partition("  #")[0].strip()
            if re.match(r"(python -m icetransfer|\./run_all|\./run\.sh|tools/|egs/\w+/run)", line):
                found.append((name(document), line))
    return found


@cache
def usage(program: str) -> str:
    """What a program's --help prints."""
    words = program.split()
    if words[0] == "python":
        words[0] = sys.executable
    elif words[0].startswith("."):
        words[0] = str(REPO / ("egs/nl/run.sh" if "run.sh" in words[0] else words[0]))
    else:
        words[0] = str(REPO / words[0])
    done = subprocess.run(
        [*words, "--help"],
        cwd=REPO,
        env={"VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{program} --help: {done.stderr}"
    return done.stdout


@pytest.mark.parametrize(("document", "command"), commands())
def test_commands_have_the_options_that_are_shown(document: str, command: str) -> None:
    program = re.match(r"python -m [\w.]+|\S+", command)
    assert program is not None
    if "/cy/" in program[0]:  # a recipe that a reader has just made
        program = re.match(r"\S+", "egs/nl/run.sh")
        assert program is not None
    if program[0].startswith("benchmarks/bench_") or program[0] == "tools/check.sh":
        assert (REPO / program[0]).is_file()
        return
    help_text = usage(program[0])
    for option in re.findall(r"(?<=\s)--[a-z][\w-]*", command):
        assert option in help_text, f"{document}: {command}: no {option} in --help"


def test_the_notebook_can_be_read_and_holds_no_output() -> None:
    """The scheduled workflow runs it; here its cells are looked at."""
    notebook = json.loads((REPO / "notebooks/quickstart.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 3 and not any(cell["outputs"] for cell in cells)
    for cell in cells:
        text = "".join(cell["source"])
        if text.startswith("%%bash\n"):
            script = text.removeprefix("%%bash\n")
            subprocess.run(["bash", "-n"], input=script, text=True, check=True)
            for command in re.findall(r"^python -m [\w.]+.*$", script, re.M):
                program = " ".join(command.split()[:3])
                assert all(x in usage(program) for x in re.findall(r"(?<=\s)--[a-z]+", command))
        else:
            compile(text, "notebook", "exec")


def test_the_workflows_run_what_is_there() -> None:
    for path in sorted((REPO / ".github/workflows").glob("*.yml")):
        for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values():
            for line in "\n".join(step.get("run", "") for step in job["steps"]).splitlines():
                for file in re.findall(r"(?:\./|notebooks/)[\w./-]+", line):
                    assert (REPO / file).is_file(), f"{path.name} runs {file}"
