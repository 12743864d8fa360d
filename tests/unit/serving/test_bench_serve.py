"""benchmarks/bench_serve.py: clients in real time lose nothing, and what they see adds up."""

import asyncio
from pathlib import Path

import numpy as np

from tests.scripts import load_script

BENCHMARK = Path(__file__).resolve().parents[3] / "benchmarks" / "bench_serve.py"


def test_clients_count_what_was_decoded_and_when(serve, columns, monkeypatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    tool = load_script(BENCHMARK)
    samples = np.zeros(24_000, np.int16)
    with serve() as site:
        address = f"ws://127.0.0.1:{site.port}/speech"
        row = asyncio.run(tool.measure(address, columns[0].id, samples, 2, 0.32))
        away = asyncio.run(tool.measure(address, "none", samples, 1, 0.32))
    assert (row["streams"], row["sent_seconds"], row["dropped_seconds"]) == (2, 3.0, 0)
    assert not row["sent_away"] and "no column 'none'" in away["sent_away"][0]
    # Chunks of 320 ms in 1.5 s; "een" in each frame of 40 ms, and in the silence behind the end.
    assert len(row["decoded_ms"]) == len(row["words_ms"]) == 3 and row["words"] > 2 * 37
    assert 0 < row["decoded_ms"][0] <= row["decoded_ms"][2]
    assert "| 2 | 3.0 | 0.0 | 0 |" in tool.table([row])
