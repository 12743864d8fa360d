"""Every public corpus in its publisher's layout, by the recipe's own run.sh, from stage 0 to WER.

The copies are small and of synthesised speech, and have the mistakes that the corpora have.
"""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parent.parent.parent
SMALL = (  # a model and a training of seconds, one tier, one engine
    *("--conf", "conf/public.yaml", "--init", "random", "transfer.size=tiny"),
    *("data.vocab_size=60", "data.features.jobs=1"),
    *("train.max_steps=2", "train.batch_seconds=8", "train.valid_every=2", "train.log_every=1"),
    *("train.checkpoint_every=2", "train.average_period=1", "train.loss_backend=torch"),
    *("decode.chunk_sizes=[16]", "decode.engines=[torch]", "decode.precisions=[fp32]"),
    *("data.corpora.common_voice.train=train", "robustness.enabled=false"),
)
MLS = {"nl": "dutch", "pl": "polish"}
REFERENCES = {  # of the test sets: as people read it, and as MLS has it, which knows no digits
    "nl": ("om veertien uur dertig is het klaar", "om uur is het klaar"),
    "pl": ("kończymy o czternastej trzydzieści", "kończymy o"),
}
TRAINED_ON = {"mls": 3, "mls_flac": 3, "common_voice": 2, "voxpopuli": 3}
MISTAKES = {  # of Common Voice: clip, and what is said of it
    "2": ("truncated", "not readable"),
    "0": ("duplicate id",),
    "70": ("no such file",),
    "71": ("empty transcript",),
    "72": ("train text outside the",),
}


@pytest.fixture(params=["nl", "pl"])
def finished(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    make_common_voice: Callable[[Path, str], Path],
    make_fleurs: Callable[[Path, str, str], Path],
    make_mls: Callable[[Path, str, str, str], Path],
    make_voxpopuli: Callable[[Path, str, str], Path],
) -> tuple[str, Path, str]:
    """A language, the folder of its data and experiment, and what run.sh said."""
    language = request.param
    make_common_voice(tmp_path / "cv", language)
    make_fleurs(tmp_path / "fleurs", language, f"{language}_{language}")
    make_voxpopuli(tmp_path / "vox", language, "ogg")
    for codec in ("opus", "flac"):
        make_mls(tmp_path / f"mls {codec}", language, MLS[language], codec)
    places = {"mls": "mls opus", "common_voice": "cv", "voxpopuli": "vox", "fleurs": "fleurs"}
    flac = {"kind": "mls", "codec": "flac", "path": str(tmp_path / "mls flac")}
    done = subprocess.run(
        [
            str(REPO / "egs" / language / "run.sh"),
            *SMALL,
            *(f"data.corpora.{name}.path={tmp_path / place}" for name, place in places.items()),
            f"data.corpora.mls_flac={json.dumps(flac)}",
            f"data.features.store={'on_the_fly' if language == 'pl' else 'precomputed'}",
            f"data.dir={tmp_path / 'data'}",
            *("--exp", str(tmp_path / "exp")),
        ],
        env=os.environ
        | {"VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return language, tmp_path, done.stdout + done.stderr


def read_json(path: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def test_from_stage_0_to_wer(finished: tuple[str, Path, str]) -> None:
    language, folder, said = finished
    results = {path.parts[-3]: read_json(path) for path in folder.glob("exp/decode/*/*/wer.json")}
    assert set(results) == {*TRAINED_ON, "fleurs"}
    for test_set, result in results.items():
        (recogs,) = folder.glob(f"exp/decode/{test_set}/*/recogs.jsonl")
        (row,) = map(json.loads, recogs.read_text(encoding="utf-8").splitlines())
        assert row["ref"] == REFERENCES[language]["mls" in test_set]
        assert (result["utterances"], result["words"]) == (1, len(row["ref"].split()))
        errors = result["insertions"] + result["deletions"] + result["substitutions"]
        assert result["errors"] == errors > 0, "two steps do not teach a language"
        assert result["wer"] == pytest.approx(100 * errors / result["words"], abs=0.01)
        assert result["language"] == language and result["chunk_size"] == 16

    subset = read_json(folder / "data/manifests/subset-all.json")
    given = {name: corpus["recordings"] for name, corpus in subset["corpora"].items()}
    assert given == TRAINED_ON | {"fleurs": 0}
    stored = list(folder.glob("data/fbank/**/*.npy"))
    assert bool(stored) == (language == "nl"), "pl computes its features on the fly"

    with (folder / "data/manifests/common_voice_rejected.tsv").open(encoding="utf-8") as table:
        reasons = {row["id"]: row["reason"] for row in csv.DictReader(table, delimiter="\t")}
    for clip, expected in MISTAKES.items():
        reason = reasons.pop(f"common_voice_{language}_{clip}")
        assert reason.startswith(expected)
    assert reasons == {"train.tsv:9": "3 tab-separated columns"}
    assert "common_voice: 1 left out: duplicate id" in said
