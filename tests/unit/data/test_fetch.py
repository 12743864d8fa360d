"""The downloader against a server on this machine: resume, checksums, space, broken archives."""

import hashlib
import http.server
import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from icetransfer.config import load_config
from icetransfer.data import corpora, download, fetch
from icetransfer.data.published import PUBLISHED
from icetransfer.experiment import create_experiment

CONTENT = bytes(range(256)) * 40


class Site:
    """A web site of files, which can break off and forget how to give ranges."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.break_after: list[int | None] = []  # bytes of each of the next answers
        self.ranges = True
        self.url = ""

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        wanted = handler.headers.get("Range")
        self.requests.append((handler.path, wanted))
        content = self.files.get(handler.path)
        if content is None:
            handler.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        if start >= len(content) and start:
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(content)}")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        limit = self.break_after.pop(0) if self.break_after else None
        handler.wfile.write(content[start:][:limit])


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(fetch, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(fetch, "BLOCK", 1000)
    made = Site()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            made.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        made.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield made
        server.shutdown()
        thread.join()


def archive(folder: Path, *below: str) -> bytes:
    """What lies in a folder as a .tar.gz."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name in below:
            tar.add(folder / name, name)
    return packed.getvalue()


def test_a_broken_connection_is_taken_up_where_it_broke(tmp_path: Path, site: Site) -> None:
    site.files["/a"] = CONTENT
    site.break_after = [3000, 2500]
    fetch.fetch(f"{site.url}/a", tmp_path / "x/a", hashlib.md5(CONTENT).hexdigest())
    assert (tmp_path / "x/a").read_bytes() == CONTENT
    assert site.requests == [("/a", None), ("/a", "bytes=3000-"), ("/a", "bytes=5500-")]
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["a"]
    fetch.fetch(f"{site.url}/a", tmp_path / "x/a")
    assert len(site.requests) == 3, "what is there was fetched again"


def test_an_earlier_runs_part_is_used(tmp_path: Path, site: Site) -> None:
    site.files["/a"] = CONTENT
    for have in (CONTENT[:5000], CONTENT):  # a whole one: killed before it got its name
        (tmp_path / "a.part").write_bytes(have)
        fetch.fetch(f"{site.url}/a", tmp_path / "a")
        assert (tmp_path / "a").read_bytes() == CONTENT
        (tmp_path / "a").unlink()
    assert [wanted for _, wanted in site.requests] == ["bytes=5000-", "bytes=10240-"]


def test_a_part_of_another_file_is_thrown_away(tmp_path: Path, site: Site) -> None:
    site.files["/a"] = CONTENT
    (tmp_path / "a.part").write_bytes(CONTENT * 2)
    fetch.fetch(f"{site.url}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_server_without_ranges_sends_all_again(tmp_path: Path, site: Site) -> None:
    site.files["/a"] = CONTENT
    site.ranges = False
    (tmp_path / "a.part").write_bytes(b"x" * 5000)
    fetch.fetch(f"{site.url}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_wrong_checksum_leaves_nothing(tmp_path: Path, site: Site) -> None:
    site.files["/a"] = CONTENT
    with pytest.raises(ValueError, match=r"the MD5 is .*, published is 00"):
        fetch.fetch(f"{site.url}/a", tmp_path / "a", "00")
    assert not list(tmp_path.iterdir())


def test_errors_say_what_to_do(tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="/nothing: HTTP 404"):
        fetch.fetch(f"{site.url}/nothing", tmp_path / "a")
    site.files["/a"] = CONTENT
    site.break_after = [10] * fetch.ATTEMPTS
    with pytest.raises(ValueError, match=r"ended after 50 of 10240 bytes.*run the stage again"):
        fetch.fetch(f"{site.url}/a", tmp_path / "a")
    assert (tmp_path / "a.part").stat().st_size == 50
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 9000}))
    with pytest.raises(ValueError, match=r"need 0\.0 GB, and the disk .* has 0\.0 GB free; make"):
        fetch.fetch(f"{site.url}/a", tmp_path / "a")


def test_an_archive_is_unpacked_once_and_a_broken_one_removed(tmp_path: Path, site: Site) -> None:
    (tmp_path / "from/d").mkdir(parents=True)
    (tmp_path / "from/d/f").write_text("content")
    site.files["/a.tar.gz"] = archive(tmp_path / "from", "d")[:-20]
    to = tmp_path / "to"
    with pytest.raises(ValueError, match=r"is broken .* and was removed: run the stage again"):
        fetch.fetch_archive(f"{site.url}/a.tar.gz", to)
    site.files["/a.tar.gz"] = archive(tmp_path / "from", "d")
    for _ in range(2):
        fetch.fetch_archive(f"{site.url}/a.tar.gz", to)
    assert (to / "d/f").read_text() == "content"
    assert sorted(path.name for path in to.iterdir()) == [".a.tar.gz.unpacked", "d"]
    assert len(site.requests) == 2


def test_an_archive_cannot_write_elsewhere(tmp_path: Path, site: Site) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../outside"), io.BytesIO())
    site.files["/a.tar.gz"] = packed.getvalue()
    with pytest.raises(ValueError, match="is broken"):
        fetch.fetch_archive(f"{site.url}/a.tar.gz", tmp_path / "to")
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("kind", ["fleurs", "mls", "voxpopuli", "common_voice"])
def test_stage_0_fetches_a_corpus_that_stage_1_reads(
    tmp_path: Path,
    site: Site,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    make_fleurs: Callable[[Path, str, str], Path],
    make_mls: Callable[[Path, str, str, str], Path],
    make_voxpopuli: Callable[[Path, str, str], Path],
    make_common_voice: Callable[[Path, str], Path],
) -> None:
    monkeypatch.setitem(PUBLISHED, kind, replace(PUBLISHED[kind], site=site.url))
    at = tmp_path / "publisher"
    corpus = tmp_path / "data/corpus/c"
    if kind == "fleurs":
        make_fleurs(at, "nl", "nl_nl")
        for split in ("train", "dev", "test"):
            site.files[f"/nl_nl/{split}.tsv"] = (at / f"nl_nl/{split}.tsv").read_bytes()
            site.files[f"/nl_nl/audio/{split}.tar.gz"] = archive(at / "nl_nl/audio", split)
    elif kind == "mls":
        make_mls(at, "nl", "dutch", "opus")
        packed = archive(at, "mls_dutch_opus")
        site.files["/mls_dutch_opus.tar.gz"] = packed
        sums = [("0" * 32, "mls_dutch"), (hashlib.md5(packed).hexdigest(), "mls_dutch_opus")]
        lines = "".join(f"{md5}  {name}.tar.gz\n" for md5, name in sums)
        site.files["/md5sum.txt"] = lines.encode()
    elif kind == "voxpopuli":
        make_voxpopuli(at, "nl", "wav")
        site.files["/n_files.json"] = json.dumps(
            {"nl": dict.fromkeys(("train", "dev", "test"), 1)}
        ).encode()
        for split in ("train", "dev", "test"):
            site.files[f"/nl/asr_{split}.tsv"] = (at / f"nl/asr_{split}.tsv").read_bytes()
            name = f"{split}_part_0"
            site.files[f"/nl/{split}/{name}.tar.gz"] = archive(at / "nl" / split, name)
    else:  # brought by a person
        make_common_voice(at, "nl")
        corpus.mkdir(parents=True)
        packed = archive(at, "cv-corpus-99.0-2026-09-01")
        (corpus / "cv-corpus-99.0-2026-09-01-nl.tar.gz").write_bytes(packed)
    settings = ["language=nl", f"data.dir={tmp_path / 'data'}", f"data.corpora.c.kind={kind}"]
    experiment = create_experiment(tmp_path / "exp", load_config([], settings))
    download.download(experiment)
    asked = len(site.requests)
    assert asked == len(site.files)
    download.download(experiment)
    assert len(site.requests) == asked, "something was fetched twice"
    corpora.prepare(experiment)
    record = json.loads((experiment.manifests_dir / "c_prepared.json").read_text())
    kept = [record["splits"][split]["recordings"] for split in ("train", "dev", "test")]
    assert kept == [2 if kind == "common_voice" else 3, 1, 1]
