"""Threads that decode the streams of all clients, those of one model together.

A stream's samples wait in its inbox.  A thread takes the stream that has waited longest and up to
`BATCH` others of the same column, gives each a chunk at most of what waits for it, decodes, and
tells the clients.  What is left waits at the end of the queue, so that a stream with much to catch
up on does not hold up the others.  A stream whose next chunk is not full does not wait in it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from icetransfer.data.utterances import SAMPLING_RATE
from icetransfer.experiment import log
from icetransfer.serving.columns import Column
from icetransfer.streaming.segments import Listener, Samples, Segment, StreamingListener
from icetransfer.streaming.sherpa import decode_chunks
from icetransfer.streaming.streams import samples_for

BATCH = 16  # streams that are decoded together


class Update(NamedTuple):
    """What is new in a stream.

    Attributes:
        column: its id.
        ended: segments that have ended.
        partial: the one that has not.
        heard: seconds of audio that have been decoded.
        cpu: processor seconds that this took, a share of those of the batches it was in.
        is_last: the stream has come to its end.
        failure: why it cannot go on; "" if it can.
    """

    column: str
    ended: list[Segment]
    partial: Segment | None
    heard: float
    cpu: float
    is_last: bool
    failure: str = ""


@dataclass(eq=False)
class Stream:
    """What one client says to one column.

    Attributes:
        column: the model.
        listener: hears it.
        deliver: is called with each update, in a thread of the engine.
    """

    column: Column
    listener: Listener
    deliver: Callable[[Update], None]
    _inbox: deque[Samples] = field(default_factory=deque)
    _waiting: int = 0  # samples in the inbox
    _heard: int = 0  # samples taken from it
    _due: int = 0  # samples, heard and waiting, with which there is something to decode
    _chunks: int = 0  # decoded
    _cpu: float = 0.0
    _has_ended: bool = False  # no more samples will come
    _is_dropped: bool = False
    _is_busy: bool = False  # a thread has it

    @property
    def seconds_waiting(self) -> float:
        """Audio that came and was not yet decoded."""
        return self._waiting / SAMPLING_RATE


class Engine:
    """Decodes streams in some threads until it is closed.

    Args:
        threads: how many.
    """

    def __init__(self, threads: int) -> None:
        self._queue: dict[Stream, None] = {}  # those with something to do, longest waiting first
        self._change = threading.Condition()
        self._is_closed = False
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def hear(self, stream: Stream, samples: Samples) -> None:
        """Takes the next samples of a stream, at 16 kHz."""
        with self._change:
            stream._inbox.append(samples)
            stream._waiting += len(samples)
            self._enqueue(stream)

    def finish(self, stream: Stream) -> None:
        """A stream will have no more samples; its last update follows."""
        with self._change:
            stream._has_ended = True
            self._enqueue(stream)

    def drop(self, stream: Stream) -> None:
        """Nobody waits for a stream any more."""
        with self._change:
            stream._is_dropped = True
            self._queue.pop(stream, None)

    def close(self) -> None:
        """Ends the threads when they have done what they are at."""
        with self._change:
            self._is_closed = True
            self._change.notify_all()
        for thread in self._threads:
            thread.join()

    def _enqueue(self, stream: Stream) -> None:
        if stream._is_busy or stream._is_dropped or stream in self._queue:
            return
        if stream._has_ended or stream._heard + stream._waiting >= stream._due:
            self._queue[stream] = None
            self._change.notify()

    def _take(self) -> list[tuple[Stream, Samples, bool]] | None:
        """What a thread is to do next, for each stream its samples and whether they are the last.

        Returns:
            None when the engine is closed.
        """
        with self._change:
            while not self._queue and not self._is_closed:
                self._change.wait()
            if self._is_closed:
                return None
            column = next(iter(self._queue)).column
            chosen = [stream for stream in self._queue if stream.column is column][:BATCH]
            taken = []
            for stream in chosen:
                del self._queue[stream]
                stream._is_busy = True
                pieces, size = [], 0
                while stream._inbox and size < column.chunk_seconds * SAMPLING_RATE:
                    pieces.append(stream._inbox.popleft())
                    size += len(pieces[-1])
                stream._waiting -= size
                stream._heard += size
                samples = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
                taken.append((stream, samples, stream._has_ended and not stream._inbox))
            return taken

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            streams = [stream for stream, _, _ in taken]
            begin = time.thread_time()
            try:
                updates = _decode(taken)
            except Exception as error:  # of a thread: the clients are told, and others go on
                log.error("%s: %s", streams[0].column.id, error, exc_info=True)
                updates = [_failed(stream, f"the model failed: {error}") for stream in streams]
            cpu = (time.thread_time() - begin) / len(streams)
            for stream, update in zip(streams, updates, strict=True):
                stream._cpu += cpu
                if update is not None and not stream._is_dropped:
                    stream.deliver(update._replace(cpu=stream._cpu))
            with self._change:
                for (stream, _, is_last), update in zip(taken, updates, strict=True):
                    stream._is_busy = False
                    stream._is_dropped |= is_last or bool(update and update.failure)
                    stream._due = _due(stream)
                    if stream._inbox or stream._has_ended:
                        self._enqueue(stream)


def _due(stream: Stream) -> int:
    if isinstance(stream.listener, StreamingListener):
        return samples_for(stream.column.chunk_size, stream._chunks + 1)
    return stream._heard + round(stream.column.chunk_seconds * SAMPLING_RATE)


def _failed(stream: Stream, why: str) -> Update:
    return Update(stream.column.id, [], None, stream._heard / SAMPLING_RATE, 0.0, True, why)


def _decode(taken: Sequence[tuple[Stream, Samples, bool]]) -> list[Update | None]:
    """An update for each stream in which something was decoded."""
    ended: dict[Stream, list[Segment]] = {stream: [] for stream, _, _ in taken}
    decoded = {stream for stream, _, is_last in taken if is_last}
    live = {}
    for stream, samples, is_last in taken:
        listener = stream.listener
        if isinstance(listener, StreamingListener):
            listener.stream.hear(samples)
            if is_last:
                listener.stream.end()
            live[listener.stream] = (stream, listener)
        else:
            ended[stream] += listener.accept(samples)
            ended[stream] += listener.finish() if is_last else []
            decoded.add(stream)
    while ready := decode_chunks([*live]):
        for one in ready:
            live[one][0]._chunks += 1
            decoded.add(live[one][0])
    for stream, listener in live.values():
        ended[stream] += listener.take_ended()
    updates: list[Update | None] = []
    for stream, _, is_last in taken:
        partial = stream.listener.partial() if stream in decoded else None
        if is_last and partial and isinstance(stream.listener, StreamingListener):
            ended[stream].append(partial)
            partial = None
        heard = stream._heard / SAMPLING_RATE
        update = Update(stream.column.id, ended[stream], partial, heard, 0.0, is_last)
        updates.append(update if stream in decoded else None)
    return updates
