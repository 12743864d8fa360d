"""The installer of k2, against pages and a wheel made here."""

import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parent.parent.parent
TORCH = torch.__version__.partition("+")[0]
CUDA = f"cuda{torch.version.cuda}" if torch.version.cuda else "cpu"
PYTHON = f"cp{sys.version_info.major}{sys.version_info.minor}"
PLATFORM = f"linux_{platform.machine()}"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="names of Linux wheels")


def wheel(version: str, torch_version: str = TORCH, cuda: str = CUDA, python: str = PYTHON) -> str:
    return f"k2-{version}+{cuda}.torch{torch_version}-{python}-{python}-{PLATFORM}.whl"


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    here = {"VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    return subprocess.run(
        [REPO / "tools" / "install_k2.sh", *arguments],
        env=os.environ | here | environment,
        capture_output=True,
        text=True,
    )


def page(folder: Path, *names: str) -> str:
    links = "\n".join(f'<a href="{name.replace("+", "%2B")}">{name}</a>' for name in names)
    (folder / "cpu.html").write_text(f"<html><body>{links}</body></html>")
    return (folder / "cpu.html").as_uri()


def test_the_newest_wheel_that_fits_is_taken(tmp_path: Path) -> None:
    names = [
        wheel("1.24.4.dev20250101"), wheel("1.24.4.dev20260101"),
        wheel("1.24.4.dev20270101", torch_version="1.6.0"),
        wheel("1.24.4.dev20270101", python="cp27"), wheel("1.24.4.dev20270101", cuda="cuda9.0"),
    ]  # fmt: skip
    done = call("--dry-run", "--page", page(tmp_path, *names))
    assert done.returncode == 0, done.stderr
    assert f"looking for a wheel for torch {TORCH}, {CUDA}, Python" in done.stderr
    assert "k2: found 1.24.4.dev20260101" in done.stderr


def test_without_a_wheel_it_says_what_there_is(tmp_path: Path) -> None:
    names = [wheel("1.24", "2.9.0", "cpu"), wheel("1.24", "2.10.1", "cuda12.8")]
    done = call("k2", "--page", page(tmp_path, *names, "k2-1.24-py27-none-any.whl", "about.html"))
    assert done.returncode == 2
    assert f"error: no wheel of k2 for torch {TORCH}" in done.stderr
    assert "there are wheels for torch 2.10.1 cuda12.8, 2.9.0 cpu." in done.stderr
    absent = call("--page", (tmp_path / "absent.html").as_uri())
    assert absent.returncode == 2 and "cannot be read" in absent.stderr
    assert call("--pages").returncode == 2


@pytest.mark.parametrize(("code", "status"), [("x = 1", 0), ("raise ImportError('libk2')", 2)])
def test_what_is_installed_is_imported(tmp_path: Path, code: str, status: int) -> None:
    name, info = wheel("1.24.4"), f"k2-1.24.4+{CUDA}.torch{TORCH}.dist-info"
    with zipfile.ZipFile(tmp_path / name, "w") as file:
        file.writestr("k2/__init__.py", code)
        version = f"Metadata-Version: 2.1\nName: k2\nVersion: 1.24.4+{CUDA}.torch{TORCH}\n"
        file.writestr(f"{info}/METADATA", version)
        tag = f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {PYTHON}-{PYTHON}-{PLATFORM}\n"
        file.writestr(f"{info}/WHEEL", tag)
        file.writestr(f"{info}/RECORD", "")
    target = str(tmp_path / "site")
    done = call("--page", page(tmp_path, name), PIP_TARGET=target, PYTHONPATH=target)
    assert done.returncode == status, done.stderr
    assert (tmp_path / "site" / "k2" / "__init__.py").is_file()
    if status:
        assert "k2 is installed but cannot be imported" in done.stderr
    else:
        assert "k2 is installed and can be imported" in done.stdout
