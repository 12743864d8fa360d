"""Many clients of icetransfer.serve at once, each speaking in real time over a websocket.

    python benchmarks/bench_serve.py --bundle egs/nl/exp/NAME/bundle --streams 1 10 50 --out FILE
    python benchmarks/bench_serve.py --full-size DIR --streams 1 2 4 8 --precision int8

The server is a process of its own, as a user starts it; the clients share this one.  Each says the
bundle's test recording again and again, a second of silence after each, and begins at a moment of
its own within a chunk.  --full-size makes a model of icefall's usual 66 M parameters with random
weights in DIR, whose computing is that of a trained one and which says nothing; it hears noise.

dropped    seconds that were sent and never decoded, and clients that were sent away
decoded    milliseconds from when the last sample of a chunk was sent to when its result was here:
           waiting, decoding and transport, without the time that filling the chunk takes
late       chunks decoded later than the next one was full
words      milliseconds from a word's end, by its last token, to when it was here, as on the page
clients    milliseconds by which this process itself sent late, which the server is not to blame for

CPU is the server's, in percent of a core; the machine's load before and after stands beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from bench_precisions import FULL_SIZE
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from icetransfer.data.utterances import SAMPLING_RATE
from icetransfer.experiment import provenance
from icetransfer.export import Source, export_tier
from icetransfer.model.transducer import build_transducer
from icetransfer.serving.columns import find_columns, find_recordings
from icetransfer.stage import atomic
from icetransfer.stage.markdown import markdown_table
from icetransfer.streaming.exported import Exported, write_tokens

BLOCK = 800  # samples of a message: 50 ms, as the page sends
LEFT = 128
SEED = 1


@dataclass
class Client:
    """What one client saw.

    Attributes:
        sent: seconds of speech.
        heard: seconds that the server says it decoded.
        decoded: of each chunk, seconds from its last sample to its result.
        words: of each word, seconds from its end to its first showing.
        own: seconds by which it sent too late itself, at most.
        cpu: of the server, in cores, each second.
        failure: why it was sent away.
    """

    sent: float = 0.0
    heard: float = 0.0
    decoded: list[float] = field(default_factory=list)
    words: list[float] = field(default_factory=list)
    own: float = 0.0
    cpu: list[float] = field(default_factory=list)
    failure: str = ""


async def speak(address: str, column: str, samples: np.ndarray, wait: float) -> Client:
    """One client from its beginning to its end."""
    client = Client()
    async with connect(address, compression=None, proxy=None) as socket:
        await socket.send(json.dumps({"type": "start", "rate": SAMPLING_RATE, "columns": [column]}))
        answer = json.loads(await socket.recv())
        client.failure = answer.get("message", "")
        if client.failure:
            return client
        await asyncio.sleep(wait)
        begin = time.monotonic()
        listening = asyncio.create_task(_listen(socket, client, begin))
        try:
            for start in range(0, len(samples), BLOCK):
                block = samples[start : start + BLOCK]
                due = begin + (start + len(block)) / SAMPLING_RATE
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                client.own = max(client.own, time.monotonic() - due)
                await socket.send(block.tobytes())
                client.sent += len(block) / SAMPLING_RATE
            await socket.send(json.dumps({"type": "end"}))
        except ConnectionClosed:
            pass  # `_listen` has read why
        await listening
    return client


async def _listen(socket: Any, client: Client, begin: float) -> None:
    shown = 0  # words of the segment that has not ended
    try:
        while True:
            message = json.loads(await socket.recv())
            at = time.monotonic() - begin
            if message["type"] == "heard":
                if client.sent > message["seconds"] - 1e-3 > client.heard:
                    client.decoded.append(at - message["seconds"])
                client.heard = message["seconds"]
                for words in [*message["ended"], message["partial"]]:
                    client.words += [at - min(word[2], client.heard) for word in words[shown:]]
                    shown = 0 if words is not message["partial"] else len(words)
            elif message["type"] == "load":
                client.cpu.append(message["cpu"])
            elif message["type"] == "error":
                client.failure = message["message"]
    except ConnectionClosed:
        pass


async def measure(address: str, column: str, samples: np.ndarray, count: int, chunk: float) -> Any:
    """A number of clients at once; one figure each of what the table has."""
    await speak(address, column, samples[:SAMPLING_RATE], 0.0)  # loads it
    draw = random.Random(SEED)
    before = os.getloadavg()[0]
    clients = await asyncio.gather(
        *(speak(address, column, samples, draw.random() * chunk) for _ in range(count))
    )
    decoded = [1000 * seconds for client in clients for seconds in client.decoded]
    words = [1000 * seconds for client in clients for seconds in client.words]
    cpu = [load for client in clients for load in client.cpu[1:]]
    return {
        "streams": count,
        "sent_seconds": round(sum(client.sent for client in clients), 2),
        "dropped_seconds": round(abs(sum(client.sent - client.heard for client in clients)), 2),
        "sent_away": [client.failure for client in clients if client.failure],
        "decoded_ms": _spread(decoded),
        "late_percent": round(100 * _mean([ms > 1000 * chunk for ms in decoded]), 3),
        "words": len(words),
        "words_ms": _spread(words),
        "clients_ms": round(1000 * max(client.own for client in clients)),
        "cpu_percent": round(100 * _mean(cpu)),
        "machine_load": [round(before, 1), round(os.getloadavg()[0], 1)],
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def _spread(values: list[float]) -> list[int]:
    """The median, 99 % and the largest."""
    return [round(float(v)) for v in np.percentile(values, [50, 99, 100])] if values else []


def make_full_size(folder: Path, chunk: int, precision: str) -> None:
    """A tier of a model with random weights and a minute of noise, unless it is there."""
    tier = Exported(folder / f"chunk-{chunk}-left-{LEFT}")
    if tier.model("encoder", precision).is_file():
        return
    model = build_transducer(FULL_SIZE, seed=SEED).eval()
    model.joiner.output_linear.bias.data[0] = 9.0  # blank, or it would speak in every frame
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters / 1e6:.1f} M parameters")
    folder.mkdir(parents=True, exist_ok=True)
    write_tokens(["<blk>", *(f"▁t{i}" for i in range(1, model.vocab_size))], folder / "tokens.txt")
    source = Source(folder / "random.pt", model, folder / "tokens.txt", "random")
    export_tier(source, tier, chunk, LEFT, [precision])
    noise = 0.05 * np.random.default_rng(SEED).standard_normal(10 * SAMPLING_RATE)
    soundfile.write(tier.dir / "test.wav", noise, SAMPLING_RATE, subtype="PCM_16")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Starts the server and measures each number of clients."""
    folder = args.bundle or args.full_size
    if args.full_size:
        make_full_size(folder, args.latency // 20, args.precision)
    columns = find_columns([folder])
    column = next(
        c for c in columns if (c.tier, c.precision) == (str(args.latency), args.precision)
    )
    recording = find_recordings([column])[0].path
    said, _ = soundfile.read(recording, dtype="int16")
    said = np.concatenate([said, np.zeros(SAMPLING_RATE, np.int16)])
    samples = np.resize(said, args.seconds * SAMPLING_RATE)
    words = [sys.executable, "-m", "icetransfer.serve", "--bundle", str(folder), "--port", "0"]
    rows: list[dict[str, Any]] = []
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as server:
        try:
            while not (found := re.search(r"localhost:(\d+)", server.stderr.readline())):
                assert server.poll() is None, "the server did not start"
            # Its log is read, or it would stand still when the pipe is full.
            threading.Thread(target=server.stderr.read, daemon=True).start()
            address = f"ws://127.0.0.1:{found[1]}/speech"
            for count in args.streams:
                row = asyncio.run(measure(address, column.id, samples, count, column.chunk_seconds))
                rows.append(row | {"column": column.id})
                print(json.dumps(row), flush=True)
        finally:
            server.terminate()
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    head = [
        *("streams", "sent, s", "dropped, s", "sent away", "decoded: p50, p99, max, ms", "late, %"),
        *("words: p50, p99, max, ms", "clients, ms", "CPU, %", "load"),
    ]
    cells = [
        [
            *(row["streams"], row["sent_seconds"], row["dropped_seconds"], len(row["sent_away"])),
            *(", ".join(map(str, row["decoded_ms"])), row["late_percent"]),
            *(", ".join(map(str, row["words_ms"])), row["clients_ms"], row["cpu_percent"]),
            " to ".join(map(str, row["machine_load"])),
        ]
        for row in rows
    ]
    return markdown_table(head, [[*map(str, line)] for line in cells])


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--bundle", type=Path, help="with a test recording")
    given.add_argument("--full-size", type=Path, metavar="DIR", help="where 66 M are, or are made")
    parser.add_argument("--latency", type=int, default=320, help="ms (default %(default)s)")
    parser.add_argument("--precision", default="fp32", help="default %(default)s")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 10, 50])
    parser.add_argument("--seconds", type=int, default=30, help="of speech of each client")
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    rows = run(args)
    print(table(rows))
    if args.out:
        tree = {"rows": rows, "provenance": provenance()}
        atomic.write_text(args.out, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
