"""Stored features: read back, and what is said of a file that is not whole."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from icetransfer.data import features
from icetransfer.data.features import compute_split, read_manifest
from icetransfer.data.loader import load_features
from icetransfer.data.shards import ROW_BYTES, ShardReader, is_whole, write_shard


@pytest.fixture
def matrices() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.standard_normal((frames, 80)).astype(np.float32) for frames in (7, 1, 12)]


def test_every_cut_has_its_rows(tmp_path: Path, matrices) -> None:
    path = tmp_path / "shard.npy"
    keys = write_shard(path, matrices)
    assert keys == ["0:7", "7:8", "8:20"] and is_whole(path)
    reader = ShardReader(str(path))
    for key, matrix in zip(keys, matrices, strict=True):
        stored = matrix.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(reader.read(key), stored)
        np.testing.assert_array_equal(reader.read(key, 2, 5), stored[2:5])
    assert write_shard(path, []) == [] and is_whole(path)


def test_what_is_missing_of_a_shard_is_named_and_the_rest_is_read(tmp_path: Path, matrices) -> None:
    path = tmp_path / "shard.npy"
    write_shard(path, matrices)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 3 * ROW_BYTES)
    reader = ShardReader(str(path))
    assert not is_whole(path) and len(reader.read("0:7")) == 7
    with pytest.raises(ValueError, match=rf"rows 8 to 20 end at byte {size},.*has {size - 480}"):
        reader.read("8:20")
    path.write_bytes(b"\x93NUMPY no array")
    assert not is_whole(path)


READS_WHILE_IT_SHRINKS = """
import sys
from icetransfer.data.shards import ShardReader
reader = ShardReader(sys.argv[1])
assert len(reader.read("0:7")) == 7
open(sys.argv[1], "r+b").truncate(200)
try:
    reader.read("0:7")
except ValueError as error:
    print(error)
"""


def test_a_shard_that_is_cut_while_it_is_read_ends_no_process(tmp_path: Path, matrices) -> None:
    write_shard(tmp_path / "shard.npy", matrices)
    command = [sys.executable, "-c", READS_WHILE_IT_SHRINKS, str(tmp_path / "shard.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "it is cut short" in done.stdout


def test_stage_2_makes_a_damaged_shard_again_and_no_other(
    tone_recipe, tone_data: Path, caplog, monkeypatch
) -> None:
    experiment = tone_recipe("rotten")
    folder = tone_data / "fbank" / "tones_train"
    rotten, whole = sorted(folder.glob("*.npy"))[:2]
    before, untouched = rotten.read_bytes(), whole.stat().st_mtime_ns
    rotten.write_bytes(before[:-1000])
    cuts = read_manifest(tone_data / "manifests" / "tones_train_fbank.jsonl.gz")
    last = [cut for cut in cuts if cut.features.storage_path == str(rotten)][-1]
    with pytest.raises(ValueError, match=rf"{last.id}.*{rotten.name}.*cut short.*run stage 2"):
        load_features(last)
    with caplog.at_level("WARNING", logger="icetransfer"):
        compute_split(experiment, "tones", "train")
    assert f"{rotten} is gone or cut short" in caplog.text
    assert rotten.read_bytes() == before and whole.stat().st_mtime_ns == untouched
    np.testing.assert_array_equal(load_features(last), last.load_features())
    monkeypatch.setattr(features, "_compute_shards", None)
    compute_split(experiment, "tones", "train")  # complete again: nothing is computed
