"""A stand-in for a model hub, on loopback: what huggingface_hub's own client asks it for."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import huggingface_hub.constants
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What the stand-in holds and has been told."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}  # "org/name/path" -> content
        self.asked: list[str] = []  # method and path of every request
        self.refuse = 0  # a status code that every request is answered with
        self.created: list[dict[str, Any]] = []


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, tree: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(tree).encode(), {"Content-Type": "application/json"})

    def _page(self) -> str:
        """An address, which the client takes apart."""
        return f"http://{self.headers['Host']}/org/name"

    def _serve(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.hub.refuse:
            self._json({"error": "Invalid credentials"}, self.hub.refuse)
        elif path == "/api/repos/create":
            self.hub.created.append(json.loads(body))
            self._json({"url": self._page()})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif "/commit/" in path:
            self._commit(path, body)
        elif path.startswith("/api/models/"):
            self._json({"id": "org/name", "sha": COMMIT, "cardData": {"license": "mit"}})
        elif "/resolve/" in path:
            self._file(path)
        else:
            self._json({"error": "not found"}, 404)

    do_GET = do_HEAD = do_POST = _serve  # noqa: N815 - http.server's names

    def _commit(self, path: str, body: bytes) -> None:
        repository = path.removeprefix("/api/models/").partition("/commit/")[0]
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.hub.files[f"{repository}/{line['value']['path']}"] = content
        self._json({"success": True, "commitOid": COMMIT, "commitUrl": self._page()})

    def _file(self, path: str) -> None:
        repository, _, rest = path.removeprefix("/").partition("/resolve/")
        commit, _, name = rest.partition("/")
        content = self.hub.files.get(f"{repository}/{name}")
        if content is None or commit != COMMIT:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            tag = f'"{hashlib.sha256(content).hexdigest()}"'
            self._answer(200, content, {"ETag": tag, "X-Repo-Commit": COMMIT})


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, cache: Any) -> Iterator[Hub]:
    """The stand-in, to which huggingface_hub talks for the time being."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        yield hub
        server.shutdown()
        thread.join()
