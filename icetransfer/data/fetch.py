"""Fetches large files so that they can be interrupted, and unpacks archives."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path

from rich.progress import DownloadColumn

from icetransfer.experiment import log
from icetransfer.stage import atomic
from icetransfer.stage.progress import progress_bar

BLOCK = 1 << 20  # bytes
ATTEMPTS = 5
PAUSE_SECONDS = 5.0  # before the second attempt; doubles
_TIMEOUT_SECONDS = 60
#: Space for an archive's content beside it, as a multiple of its size: audio packs hardly.
_UNPACKED = 1.2


def fetch(url: str, target: Path, md5: str | None = None) -> None:
    """Fetches a file, going on where an earlier run stopped; does nothing when it is there.

    Args:
        url: Where it is.
        target: Where it goes; `target`.part until it is whole.
        md5: Its checksum where one is published.

    Raises:
        ValueError: It cannot be fetched, does not fit on the disk, or has another checksum.
    """
    if target.is_file():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    for attempt in range(ATTEMPTS):
        try:
            _fetch_rest(url, part, target.name)
            break
        except urllib.error.HTTPError as error:
            raise ValueError(f"{url}: HTTP {error.code} {error.reason}") from None
        except OSError as error:  # no network, a broken connection
            if attempt + 1 == ATTEMPTS:
                raise ValueError(
                    f"{url} cannot be fetched ({error}); run the stage again to go on, or put the "
                    f"file at {target} yourself"
                ) from None
            log.warning("%s: %s; trying again", url, error)
            time.sleep(PAUSE_SECONDS * 2**attempt)
    if md5 is not None and (found := _md5(part)) != md5:
        part.unlink()
        raise ValueError(f"{url}: the MD5 is {found}, published is {md5}; run the stage again")
    part.replace(target)


def _fetch_rest(url: str, part: Path, title: str) -> None:
    """Appends to the part what it lacks.

    Raises:
        ConnectionError: The connection ended early.
        ValueError: It does not fit on the disk.
        OSError: The server cannot be reached, or refuses.
    """
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        size = (error.headers.get("Content-Range") or "").rpartition("/")[2]
        if error.code == 416 and size == str(have):
            return  # it was whole
        if error.code == 416:
            part.unlink()  # another file stands there now
            raise ConnectionError("the file has changed") from None
        raise
    with response:
        if have and response.status != 206:  # the server knows no ranges: from the start
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        if total:
            _check_space(part, round((total - have) + _UNPACKED * total), url)
        with (
            part.open("ab" if have else "wb") as file,
            progress_bar(DownloadColumn()) as progress,
        ):
            bar = progress.add_task(f"fetch {title}", total=total, completed=have)
            while block := response.read(BLOCK):
                file.write(block)
                progress.advance(bar, len(block))
    size_now = part.stat().st_size
    if total and size_now < total:
        raise ConnectionError(f"the connection ended after {size_now} of {total} bytes")


def _check_space(path: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise ValueError(
            f"{what} and what it holds need {needed / 1e9:.1f} GB, and the disk of {path.parent} "
            f"has {free / 1e9:.1f} GB free; make room, or set data.dir to another disk"
        )


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def fetch_archive(url: str, folder: Path, md5: str | None = None) -> None:
    """Fetches a .tar.gz and unpacks it, unless that is done; the archive is removed.

    Args:
        url: Where it is.
        folder: What its names are relative to; `folder`/.<archive>.unpacked says that it is done.
        md5: Its checksum where one is published.

    Raises:
        ValueError: As `fetch`, or the archive is broken.
    """
    archive = folder / url.rpartition("/")[2]
    done = folder / f".{archive.name}.unpacked"
    if done.is_file():
        return
    fetch(url, archive, md5)
    unpack(archive, folder)
    atomic.write_text(done, url + "\n")
    archive.unlink()


def _extract(packed: tarfile.TarFile, folder: Path) -> None:
    """Extracts all files; with Python before 3.11.4, which has no filters, only plain ones."""
    if hasattr(tarfile, "data_filter"):
        packed.extractall(folder, filter="data")
        return
    for member in packed:
        inside = (folder / member.name).resolve().is_relative_to(folder.resolve())
        if not inside or not (member.isfile() or member.isdir()):
            raise tarfile.TarError(f"{member.name!r} is outside of the folder, or no plain file")
        packed.extract(member, folder)


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks a .tar.gz; names that would leave the folder are refused.

    Raises:
        ValueError: The archive is broken; it is removed.
    """
    log.info("unpacking %s", archive)
    try:
        with gzip.open(archive) as plain:
            with tarfile.open(fileobj=plain, mode="r|") as packed:
                _extract(packed, folder)
            while plain.read(BLOCK):  # to the checksum, which stands at the end
                pass
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault, not the archive's
        archive.unlink()
        raise ValueError(
            f"{archive} is broken ({error}) and was removed: run the stage again to fetch it again"
        ) from None
