"""What this machine has for the recipes, what it lacks, and the line that installs it.

    python -m icetransfer.doctor
    python -m icetransfer.doctor > doctor.txt      to attach to a bug report

First what recipes need: Python, the pinned packages, espeak-ng, memory and disk.  Then what they
can use where it is there: GPUs, k2, kaldifeat, Slurm, base models, prepared data.  Last what only
developers use.  Exit code 1 when something is missing that every recipe needs.  It needs no package
itself, so that it can say which ones are missing.
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

import icetransfer
from icetransfer.stage.command import command_parser

REPO = Path(__file__).resolve().parents[1]
INSTALL = "python -m pip install -r requirements.txt"
FOR_DEVELOPERS = "# What the tests and checks need besides."  # begins their part of that file
ENOUGH_DISK_GB = 5
ENOUGH_MEMORY_GB = 4


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        state: "ok"; "optional", when it is missing and recipes run without it; "needed" otherwise.
        what: What it is.
        found: What there is.
        advice: The command or step that changes it, or empty.
        part: What it is for.
    """

    state: Literal["ok", "optional", "needed"]
    what: str
    found: str
    advice: str = ""
    part: Literal["run", "use", "develop"] = "use"


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
        return Finding("ok", "Python", f"{version}, {sys.executable}", part="run")
    return Finding("needed", "Python", version, "use Python 3.10, 3.11 or 3.12", "run")


def _packages(requirements: Path) -> Iterator[Finding]:
    """Compares what is installed with the pins: of what runs, then of what developers use."""
    for part, pinned in _pins(requirements).items():
        what = "packages" if part == "run" else "tools"
        installed = {name: _version(name) for name in pinned}
        missing = [name for name, version in installed.items() if version is None]
        if missing:
            state: Literal["needed", "optional"] = "needed" if part == "run" else "optional"
            yield Finding(state, what, f"missing: {', '.join(missing)}", INSTALL, part)
        other = [
            f"{name} {version} (pinned: {pinned[name]})"
            for name, version in installed.items()
            if version is not None and version.partition("+")[0] != pinned[name]
        ]
        if other:
            found = f"other versions: {', '.join(other)}"
            yield Finding("optional", what, found, INSTALL, part)
        if not missing and not other:
            found = f"all {len(pinned)} of requirements.txt, as pinned"
            yield Finding("ok", what, found, part=part)


def _pins(requirements: Path) -> dict[Literal["run", "develop"], dict[str, str]]:
    """Versions by package, of the lines that are for this Python, by what they are for."""
    older = sys.version_info < (3, 11)
    pins: dict[Literal["run", "develop"], dict[str, str]] = {"run": {}, "develop": {}}
    part: Literal["run", "develop"] = "run"
    for line in requirements.read_text(encoding="utf-8").splitlines():
        if line == FOR_DEVELOPERS:
            part = "develop"
        match = re.fullmatch(r"([\w-]+)==([\w.]+)(; python_version ([<>]=?) \"3\.11\")?", line)
        if match and (match[4] is None or (match[4] == "<") == older):
            pins[part][match[1]] = match[2]
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


def _optional_package(package: str, gain: str, advice: str) -> Finding:
    if version := _version(package):
        return Finding("ok", package, version)
    return Finding("optional", package, f"not installed ({gain})", advice)


def _machine(root: Path) -> Iterator[Finding]:
    if importlib.util.find_spec("espeakng_loader") is not None:
        import espeakng_loader

        there = Path(espeakng_loader.get_library_path()).is_file()
        found = "found" if there else "its library is missing"
        state: Literal["ok", "needed"] = "ok" if there else "needed"
        yield Finding(state, "espeak-ng", found, "" if there else INSTALL, "run")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    yield Finding(
        "ok" if memory >= ENOUGH_MEMORY_GB else "optional",
        "machine",
        f"{cores} cores, {memory:.0f} GB of memory",
        "" if memory >= ENOUGH_MEMORY_GB else "smaller train.batch_seconds and data.features.jobs",
        "run",
    )
    free = shutil.disk_usage(root).free / 1e9
    enough = free >= ENOUGH_DISK_GB
    advice = (
        "" if enough else "the mini preset needs about 1 GB; data.dir=DIR and --exp DIR move it"
    )
    yield Finding(
        "ok" if enough else "optional", "disk", f"{free:.0f} GB free in {root}", advice, "run"
    )


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
            advice = facts.get("get", f"put it at {facts['path']}")
            yield Finding("optional", f"base model {name}", "not here", advice)


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
        advice = f"egs/{bare[0]}/run.sh, or ./run_all.sh, prepares what it needs"
        yield Finding("optional", "recipes", f"no data prepared in {', '.join(bare)}", advice)


MARKS = {"ok": "ok     ", "optional": "without", "needed": "MISSING"}
PARTS = {
    "run": "Needed to run",
    "use": "Used where it is there",
    "develop": "For developers: lint, types and tests",
}


def main() -> None:
    """Prints a line for each finding, by what it is for, and what changes it below."""
    command_parser(__doc__, "docs/troubleshooting.md").parse_args()
    findings = list(examine(REPO))
    print(f"icetransfer {icetransfer.__version__} in {REPO}")
    for part, title in PARTS.items():
        print(f"\n{title}")
        for finding in findings:
            if finding.part != part:
                continue
            print(f"  {MARKS[finding.state]}  {finding.what}: {finding.found}")
            if finding.advice:
                print(f"           -> {finding.advice}")
    missing = [finding.what for finding in findings if finding.state == "needed"]
    ready = f"missing: {', '.join(missing)}" if missing else "nothing is missing that recipes need"
    print(f"\n{ready}" + ("" if missing else "; next: ./run_all.sh --smoke"))
    if missing:
        sys.exit(1)


if __name__ == "__main__":
    main()
