"""The server: the page and its files over HTTP, speech over websockets, at one address."""

from __future__ import annotations

import asyncio
import errno
import http
import ipaddress
import json
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import InvalidMessage
from websockets.http11 import Request, Response

from icetransfer.experiment import log
from icetransfer.serving.columns import Column, describe, find_recordings
from icetransfer.serving.engine import Engine
from icetransfer.serving.session import Limits, Session, peer

PAGE = Path(__file__).parent / "page"
SPEECH = "/speech"  # the path of the websocket
LOCAL = ("localhost", "127.0.0.1", "::1")
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".wav": "audio/wav",
}
POLICY = (
    "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
)


class _Connection(ServerConnection):
    """Says in the log when what comes is not HTTP, which the library does not."""

    def connection_lost(self, exc: Exception | None) -> None:
        error = self.protocol.handshake_exc
        if isinstance(error, InvalidMessage) and not isinstance(error.__cause__, EOFError):
            log.warning("%s closed: %s (%s)", peer(self), error, error.__cause__)
        super().connection_lost(exc)


class Site:
    """What is at an address.

    Args:
        columns: what the page offers.
        host: a name or address of this machine.
        limits: of each client.
    """

    def __init__(self, columns: Sequence[Column], host: str, limits: Limits) -> None:
        recordings = find_recordings(columns)
        told = json.dumps(describe(columns, recordings), ensure_ascii=False).encode()
        self._files: dict[str, tuple[str, bytes | Path]] = {
            f"/{path.name}": (path.suffix, path) for path in PAGE.iterdir() if path.suffix in TYPES
        }
        self._files["/"] = self._files["/index.html"]
        self._files["/columns.json"] = (".json", told)
        for number, recording in enumerate(recordings):
            self._files[f"/recordings/{number}.wav"] = (".wav", recording.path)
        self._columns = {column.id: column for column in columns}
        self._host, self._limits = host, limits

    async def run(self, port: int, threads: int, stop: asyncio.Event, ready: asyncio.Event) -> int:
        """Serves until it is told to stop.

        Args:
            port: 0 for any that is free.
            threads: that decode.
            stop: ends it.
            ready: is set when clients can come.

        Returns:
            How many clients spoke.

        Raises:
            ValueError: the address cannot be had.
        """
        engine, spoke = Engine(threads), 0
        speaking: dict[Session, int] = {}

        async def speak(connection: ServerConnection) -> None:
            nonlocal spoke
            spoke += 1
            await Session(connection, self._columns, engine, self._limits, speaking).run()

        try:
            async with serve(
                speak,
                sock=listening_socket(self._host, port),
                process_request=self._answer,
                compression=None,  # on one machine it costs more than it saves
                server_header=None,
                max_size=self._limits.message,
                ping_interval=self._limits.ping,
                ping_timeout=self._limits.ping,
                close_timeout=2,
                create_connection=_Connection,
                logger=_library_log(),
            ) as server:
                self.port = server.sockets[0].getsockname()[1]
                ready.set()
                await stop.wait()
        finally:
            engine.close()
        return spoke

    def _answer(self, connection: ServerConnection, request: Request) -> Response | None:
        """A file, or None for who wants to speak."""
        asked = request.headers.get_all("Host")
        host = asked[0] if len(asked) == 1 else ""
        if not self._is_ours(host):
            return self._refuse(connection, f"Host {host!r} is not this server's name")
        if request.path == SPEECH:
            # Browsers tell which page opens a websocket; other programs send no Origin.
            for origin in request.headers.get_all("Origin"):
                if urlsplit(origin).netloc != host:
                    return self._refuse(connection, f"pages of {origin!r} may not listen here")
            return None
        suffix, content = self._files.get(urlsplit(request.path).path, ("", b""))
        if not suffix:
            return connection.respond(http.HTTPStatus.NOT_FOUND, "There is no such page.\n")
        body = content if isinstance(content, bytes) else content.read_bytes()
        headers = Headers()
        headers["Content-Type"] = TYPES[suffix]
        headers["Content-Length"] = str(len(body))
        headers["Content-Security-Policy"] = POLICY
        headers["X-Content-Type-Options"] = "nosniff"
        headers["Cache-Control"] = "no-store"
        headers["Connection"] = "close"
        return Response(200, "OK", headers, body)

    def _is_ours(self, host: str) -> bool:
        """Whether a Host header names this server, and not a name that was pointed at it."""
        name = urlsplit(f"//{host}").hostname or ""
        return is_everywhere(self._host) or name in (*LOCAL, self._host)

    def _refuse(self, connection: ServerConnection, why: str) -> Response:
        log.warning("%s refused: %s", peer(connection), why)
        return connection.respond(http.HTTPStatus.FORBIDDEN, f"{why}.\n")


def is_everywhere(host: str) -> bool:
    """Whether it stands for all addresses of this machine: 0.0.0.0 or ::."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that clients can come to.

    Raises:
        ValueError: the port is taken or not allowed, or the host is not this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family = found[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except socket.gaierror as error:
        raise ValueError(
            f"--host {host}: {error.strerror}; expected a name of this machine"
        ) from None
    except OSError as error:
        reasons = {
            errno.EADDRINUSE: f"port {port} is in use: end the program that uses it, or choose "
            f"another with --port",
            errno.EACCES: f"port {port} needs more rights: choose one above 1023 with --port",
            errno.EADDRNOTAVAIL: f"--host {host} does not belong to this machine: 127.0.0.1 is for "
            f"this machine only, 0.0.0.0 for all that reach it",
        }
        raise ValueError(reasons.get(error.errno or 0, f"{host}:{port}: {error}")) from None


def _library_log() -> logging.Logger:
    """The websockets library's log, from which each problem becomes a line of ours."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            error = record.exc_info[1] if record.exc_info else None
            cause = error.__cause__ or error if error else None
            address = getattr(record, "websocket", None)
            log.warning(
                "%s closed: %s%s",
                peer(address) if address else "a client",
                record.getMessage(),
                f" ({cause})" if cause else "",
            )

    found = logging.getLogger("icetransfer.websockets")
    found.handlers = [Lines(level=logging.WARNING)]
    found.propagate = False
    found.setLevel(logging.WARNING)
    return found


def run_until_interrupted(site: Site, url_host: str, port: int, threads: int) -> None:
    """Serves until Ctrl-C or SIGTERM.

    Raises:
        ValueError: the address cannot be had.
    """

    async def run() -> int:
        stop, ready = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        running = asyncio.create_task(site.run(port, threads, stop, ready))
        opened = asyncio.create_task(ready.wait())
        await asyncio.wait({running, opened}, return_when=asyncio.FIRST_COMPLETED)
        if ready.is_set():
            log.info("open http://%s:%d; end with Ctrl-C", url_host, site.port)
        opened.cancel()
        return await running

    spoke = asyncio.run(run())
    # On a terminal the ^C is written over.
    log.info("%sended; %d listened", "\r" if sys.stderr.isatty() else "", spoke)
