"""What is said over one websocket: a client's speech, and what each column hears in it.

The client begins with {"type": "start", "rate": 48000, "columns": [...]}.  When the models are
loaded it gets {"type": "ready"} and then sends its speech as it is spoken, in binary messages of
16-bit little-endian PCM, mono; {"type": "rate", "rate": 44100} if the rate changes; {"type": "end"}
when it has nothing more to say.  It gets {"type": "heard", "column": id, "ended": [[word, ...],
...], "partial": [word, ...], "seconds", "cpu"} for each chunk, with a word as [text, start, end,
confidence] in seconds; once a second {"type": "load"}; and {"type": "done"}, or {"type": "error",
"message"}, before the connection is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from icetransfer.experiment import log
from icetransfer.serving.columns import Column
from icetransfer.serving.engine import Engine, Stream, Update
from icetransfer.streaming.audio import Converter
from icetransfer.streaming.segments import Segment

RATES = range(8000, 192_001)  # Hz
# Close codes of RFC 6455.
OK, UNSUPPORTED, POLICY, TRY_LATER = 1000, 1003, 1008, 1013


@dataclass(frozen=True)
class Limits:
    """What a client may do.

    Attributes:
        message: bytes of one.
        messages: a second, on average.
        seconds: of speech in one connection.
        ahead: seconds by which speech may be ahead of the clock.
        behind: seconds by which the models may be behind the speech.
        idle: seconds without a message.
        ping: seconds after which a client is asked whether it is there, and in which it answers.
        streams: columns of all clients together.
    """

    message: int = 1 << 17
    messages: int = 100
    seconds: float = 3600.0
    ahead: float = 5.0
    behind: float = 20.0
    idle: float = 30.0
    ping: float = 20.0
    streams: int = 128


class ClosedError(Exception):
    """A client is sent away.

    Args:
        code: of RFC 6455.
        why: what is wrong and what to do.
    """

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code


class Session:
    """One client, from its first message to its last.

    Args:
        connection: to it.
        columns: by id.
        engine: decodes.
        limits: of this client.
        speaking: sessions, with the columns of each; this one adds its own.
    """

    def __init__(
        self,
        connection: ServerConnection,
        columns: Mapping[str, Column],
        engine: Engine,
        limits: Limits,
        speaking: dict[Session, int],
    ) -> None:
        self._connection, self._columns, self._engine = connection, columns, engine
        self._limits, self._speaking = limits, speaking
        self._loop = asyncio.get_running_loop()
        self._streams: list[Stream] = []
        self._outbox: dict[str, dict[str, Any]] = {}  # by column
        self._has_news = asyncio.Event()
        self._running: set[str] = set()  # columns that have not come to their end
        self._failure = ""
        self._begin = 0.0
        self._messages = 0
        self._seconds = 0.0  # of speech

    async def run(self) -> None:
        """Serves the client until one side has enough; says in the log why it ended."""
        name = peer(self._connection)
        sender = None
        try:
            convert = await self._start(name)
            sender = asyncio.create_task(self._send())
            await self._listen(convert)
            await asyncio.wait_for(sender, self._limits.behind + 10)
            if self._failure:
                raise ClosedError(POLICY, self._failure)
            await self._tell({"type": "done"})
            await self._connection.close()
            log.info("%s ended after %.1f s of speech", name, self._seconds)
        except ClosedError as error:
            log.warning("%s closed: %s", name, error)
            await self._send_away(error)
        except asyncio.TimeoutError:
            log.warning("%s closed: the models did not come to the end of its speech", name)
            await self._send_away(ClosedError(TRY_LATER, "the models are too slow: choose fewer"))
        except ConnectionClosed as error:
            log.info("%s %s after %.1f s of speech", name, _end_of(error), self._seconds)
        finally:
            if sender is not None:
                sender.cancel()
                await asyncio.gather(sender, return_exceptions=True)
            for stream in self._streams:
                self._engine.drop(stream)
            self._speaking.pop(self, None)

    async def _start(self, name: str) -> Converter:
        message = await self._receive()
        tree = _read(message)
        wanted = tree.get("columns")
        if tree.get("type") != "start" or not isinstance(wanted, list):
            raise ClosedError(UNSUPPORTED, 'expected {"type": "start", "rate", "columns"} first')
        unknown = [i for i in wanted if not isinstance(i, str) or i not in self._columns]
        if unknown or not wanted or len({*wanted}) < len(wanted):
            which = f"there is no column {unknown[0]!r}" if unknown else "no columns, or one twice"
            raise ClosedError(POLICY, f"{which}: load the page again and choose from it")
        if (taken := sum(self._speaking.values())) + len(wanted) > self._limits.streams:
            raise ClosedError(
                TRY_LATER,
                f"{taken} streams are open and {self._limits.streams} may be: choose fewer "
                f"columns, or try again later",
            )
        self._speaking[self] = len(wanted)
        convert = Converter(_rate(tree), name)
        try:
            for column in (self._columns[i] for i in wanted):
                listener = await asyncio.to_thread(column.listen)
                self._streams.append(Stream(column, listener, self._deliver))
        except (ValueError, OSError) as error:
            raise ClosedError(POLICY, f"a model cannot be loaded: {error}") from error
        self._running = {*wanted}
        await self._tell({"type": "ready"})
        self._begin = time.monotonic()
        log.info("%s speaks at %d Hz to %s", name, tree["rate"], ", ".join(wanted))
        return convert

    async def _receive(self) -> str | bytes:
        try:
            return await asyncio.wait_for(self._connection.recv(), self._limits.idle)
        except asyncio.TimeoutError:
            raise ClosedError(
                POLICY, f"nothing came for {self._limits.idle:g} s: start again to go on"
            ) from None

    async def _listen(self, convert: Converter) -> None:
        """Hands on what is said until its end."""
        while True:
            message = await self._receive()
            self._check_pace()
            if isinstance(message, bytes):
                if len(message) % 2:
                    raise ClosedError(UNSUPPORTED, "a message is not 16-bit PCM: its bytes are odd")
                samples = np.frombuffer(message, "<i2")[:, None].astype(np.float32)
                before = convert.seconds
                self._hear(convert(samples / np.float32(32768)))
                self._seconds += convert.seconds - before
                continue
            tree = _read(message)
            if tree.get("type") not in ("rate", "end"):
                raise ClosedError(UNSUPPORTED, f"no message is of type {tree.get('type')!r}")
            self._hear(convert(np.zeros((0, 1), np.float32), last=True))
            if tree["type"] == "end":
                break
            convert = Converter(_rate(tree), peer(self._connection))
            log.info("%s goes on at %d Hz", peer(self._connection), tree["rate"])
        for stream in self._streams:
            self._engine.finish(stream)

    def _hear(self, samples: np.ndarray) -> None:
        if self._failure:
            raise ClosedError(POLICY, self._failure)
        if len(samples):
            for stream in self._streams:
                self._engine.hear(stream, samples)

    def _check_pace(self) -> None:
        self._messages += 1
        clock = time.monotonic() - self._begin + self._limits.ahead
        if self._seconds > clock or self._messages > self._limits.messages * clock:
            raise ClosedError(
                POLICY,
                f"{self._seconds:.1f} s of speech in {self._messages} messages came too fast: send "
                f"it as it is spoken, at most {self._limits.messages} messages a second",
            )
        if self._seconds > self._limits.seconds:
            raise ClosedError(
                POLICY, f"{self._limits.seconds:g} s of speech are the most: start again to go on"
            )
        late = max(stream.seconds_waiting for stream in self._streams)
        if late > self._limits.behind:
            raise ClosedError(
                TRY_LATER,
                f"the models are {late:.0f} s behind: choose fewer columns, longer chunks or int8",
            )

    def _deliver(self, update: Update) -> None:
        self._loop.call_soon_threadsafe(self._post, update)

    def _post(self, update: Update) -> None:
        """Puts an update into the outbox, on top of one that was not sent yet."""
        news = self._outbox.setdefault(update.column, {"ended": []})
        news["ended"] += [_words(segment) for segment in update.ended]
        news["partial"] = _words(update.partial) if update.partial else []
        news |= {"seconds": round(update.heard, 2), "cpu": round(update.cpu, 4)}
        self._failure = self._failure or update.failure
        if update.is_last:
            self._running.discard(update.column)
        self._has_news.set()

    async def _send(self) -> None:
        """Sends the updates, and the load once a second, until all columns are at their end."""
        load = _Load()
        while self._running or self._outbox:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._has_news.wait(), load.wait())
            self._has_news.clear()
            outbox, self._outbox = self._outbox, {}
            for column, news in outbox.items():
                await self._tell({"type": "heard", "column": column, **news})
            if load.wait() == 0:
                late = max(stream.seconds_waiting for stream in self._streams)
                await self._tell(
                    load.measure()
                    | {
                        "streams": sum(self._speaking.values()),
                        "behind": round(late, 2),
                    }
                )

    async def _tell(self, tree: dict[str, Any]) -> None:
        await self._connection.send(json.dumps(tree, ensure_ascii=False))

    async def _send_away(self, error: ClosedError) -> None:
        try:
            await self._tell({"type": "error", "message": str(error)})
            await self._connection.close(
                error.code, str(error).encode()[:120].decode("utf-8", "ignore")
            )
        except ConnectionClosed:
            pass


class _Load:
    """What this process takes of the processors, measured once a second."""

    def __init__(self) -> None:
        self._at, self._cpu = time.monotonic(), time.process_time()

    def wait(self) -> float:
        """Seconds to the next measurement."""
        return max(0.0, self._at + 1 - time.monotonic())

    def measure(self) -> dict[str, Any]:
        at, cpu = time.monotonic(), time.process_time()
        load = (cpu - self._cpu) / (at - self._at)
        self._at, self._cpu = at, cpu
        return {"type": "load", "cpu": round(load, 3), "cores": os.cpu_count()}


def peer(connection: ServerConnection) -> str:
    """A client's address and port."""
    address = connection.remote_address
    return f"{address[0]}:{address[1]}" if address else "a client"


def _end_of(error: ConnectionClosed) -> str:
    """How the other side ended it, or the library for it."""
    if error.sent is not None and error.rcvd is None:
        return f"closed: {error.sent.reason or error.sent.code}"
    if error.rcvd is None:
        return "vanished"
    return "left"


def _read(message: str | bytes) -> dict[str, Any]:
    try:
        tree = json.loads(message) if isinstance(message, str) else None
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        raise ClosedError(UNSUPPORTED, "a message is not a JSON object")
    return tree


def _rate(tree: dict[str, Any]) -> int:
    rate = tree.get("rate")
    if not isinstance(rate, int) or rate not in RATES:
        raise ClosedError(
            UNSUPPORTED, f"a rate of {rate!r} Hz: expected {RATES.start} to {RATES.stop - 1}"
        )
    return rate


def _words(segment: Segment) -> list[list[Any]]:
    return [
        [word.text, round(word.start, 2), round(word.end, 2), round(word.confidence, 3)]
        for word in segment.words
    ]
