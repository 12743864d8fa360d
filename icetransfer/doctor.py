"""What this machine has for the recipes, what it lacks, and the line that installs it.

    python -m icetransfer.doctor
    python -m icetransfer.doctor > doctor.txt      to attach to a bug report

Looks at Python, the pinned packages, GPUs, k2 and kaldifeat, espeak-ng, cores, memory, disk, Slurm,
the base models and each recipe's data. Exit code 1 when something is missing that every recipe
needs. It needs no package itself, so that it can say which ones are missing.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from icetransfer.stage.command import command_parser

REPO = Path(__file__).resolve().parents[1]
INSTALL = "python -m pip install -r requirements.txt"
ENOUGH_DISK_GB = 5
ENOUGH_MEMORY_GB = 4


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        state: "ok"; "optional", when it is missing and recipes run without it; "needed" otherwise.
        what: What it is.
        found: What there is.
        mend: The command or step that changes it, or empty.
    """

    state: Literal["ok", "optional", "needed"]
    what: str
    found: str
    mend: str = ""


def examine(root: Path) -> Iterator[Finding]:
    """Looks at everything, in the order in which a newcomer needs it.

    Args:
        root: The repository's folder.
    """
    yield _python()
    yield from _packages(root / "requirements.txt")
    yield from _torch()
    for package, gain in (("k2", "the transducer loss"), ("kaldifeat", "features on a GPU")):
        yield _optional_package(package, gain, f"tools/install_k2.sh {package}")
    yield from _machine(root)
    yield _slurm()
    yield from _base_models(root)
    yield from _recipes(root)


def _python() -> Finding:
    version = platform.python_version()
    if (3, 10) <= sys.version_info[:2] < (3, 13):
        return Finding("ok", "Python", f"{version}, {sys.executable}")
    return Finding("needed", "Python", version, "use Python 3.10, 3.11 or 3.12")


def _packages(requirements: Path) -> Iterator[Finding]:
    """Compares what is installed with the pins."""
    pinned = _pins(requirements)
    installed = {name: _version(name) for name in pinned}
    missing = [name for name, version in installed.items() if version is None]
    if missing:
        yield Finding("needed", "packages", f"missing: {', '.join(missing)}", INSTALL)
    other = [
        f"{name} {version} (pinned: {pinned[name]})"
        for name, version in installed.items()
        if version is not None and version.partition("+")[0] != pinned[name]
    ]
    if other:
        yield Finding("optional", "packages", f"other versions: {', '.join(other)}", INSTALL)
    if not missing and not other:
        yield Finding("ok", "packages", f"all {len(pinned)} of requirements.txt, as pinned")


def _pins(requirements: Path) -> dict[str, str]:
    """Versions by package, of the lines that are for this Python."""
    older = sys.version_info < (3, 11)
    pins = {}
    for line in requirements.read_text(encoding="utf-8").splitlines():
        match = re.fullmatch(r"([\w-]+)==([\w.]+)(; python_version ([<>]=?) \"3\.11\")?", line)
        if match and (match[4] is None or (match[4] == "<") == older):
            pins[match[1]] = match[2]
    return pins


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _torch() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs"
        yield Finding(
            "optional", "GPU", f"none that torch sees ({built})", "nvidia-smi tells of the driver"
        )
        return
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        found = f"{device.name}, {device.total_memory / 2**30:.0f} GB"
        precision = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: fp32 is the default"
        yield Finding("ok", f"GPU {number}", f"{found}, {precision}")


def _optional_package(package: str, gain: str, mend: str) -> Finding:
    if version := _version(package):
        return Finding("ok", package, version)
    return Finding("optional", package, f"not installed ({gain})", mend)


def _machine(root: Path) -> Iterator[Finding]:
    if importlib.util.find_spec("espeakng_loader") is not None:
        import espeakng_loader

        there = Path(espeakng_loader.get_library_path()).is_file()
        found = "found" if there else "its library is missing"
        yield Finding("ok" if there else "needed", "espeak-ng", found, "" if there else INSTALL)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    yield Finding(
        "ok" if memory >= ENOUGH_MEMORY_GB else "optional",
        "machine",
        f"{cores} cores, {memory:.0f} GB of memory",
        "" if memory >= ENOUGH_MEMORY_GB else "smaller train.batch_seconds and data.features.jobs",
    )
    free = shutil.disk_usage(root).free / 1e9
    enough = free >= ENOUGH_DISK_GB
    mend = "" if enough else "the mini preset needs about 1 GB; data.dir=DIR and --exp DIR move it"
    yield Finding("ok" if enough else "optional", "disk", f"{free:.0f} GB free in {root}", mend)


def _slurm() -> Finding:
    if shutil.which("sbatch") is None:
        return Finding("optional", "Slurm", "no sbatch here: sweeps run on this machine", "")
    done = subprocess.run(["sinfo", "--version"], capture_output=True, text=True, check=False)
    return Finding("ok", "Slurm", done.stdout.strip() or "sbatch found")


def _base_models(root: Path) -> Iterator[Finding]:
    if importlib.util.find_spec("yaml") is None:
        return
    import yaml

    table = yaml.safe_load((root / "icetransfer/base_models.yaml").read_text(encoding="utf-8"))
    for name, facts in table.items():
        if (root / facts["path"]).is_file():
            yield Finding("ok", f"base model {name}", facts["path"])
        else:
            mend = facts.get("get", f"put it at {facts['path']}")
            yield Finding("optional", f"base model {name}", "not here", mend)


def _recipes(root: Path) -> Iterator[Finding]:
    """What each recipe has prepared, by the files that its stages leave."""
    bare = []
    for script in sorted(root.glob("egs/*/run.sh")):
        recipe = script.parent
        if recipe.name == "TEMPLATE":
            continue
        data = sorted(path.parent.parent for path in recipe.glob("data/**/manifests/*_train*"))
        runs = len(list(recipe.glob("exp/**/averaged.pt")))
        if not data:
            bare.append(recipe.name)
            continue
        where = ", ".join(sorted({str(path.relative_to(recipe)) for path in data}))
        trained = f"{runs} trained model{'' if runs == 1 else 's'}"
        yield Finding("ok", f"egs/{recipe.name}", f"manifests in {where}; {trained}")
    if bare:
        mend = f"egs/{bare[0]}/run.sh, or ./run_all.sh, prepares what it needs"
        yield Finding("optional", "recipes", f"no data prepared in {', '.join(bare)}", mend)


MARKS = {"ok": "ok     ", "optional": "without", "needed": "MISSING"}


def main() -> None:
    """Prints a line for each finding, and what mends it below."""
    command_parser(__doc__, "docs/troubleshooting.md").parse_args()
    findings = list(examine(REPO))
    for finding in findings:
        print(f"{MARKS[finding.state]}  {finding.what}: {finding.found}")
        if finding.mend:
            print(f"         -> {finding.mend}")
    if any(finding.state == "needed" for finding in findings):
        sys.exit(1)


if __name__ == "__main__":
    main()
