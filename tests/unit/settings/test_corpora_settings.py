"""Which dev and test sets a config asks for."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from icetransfer.settings.corpora import Corpus, must_hold


@pytest.mark.parametrize(
    ("corpus", "wanted"),
    [
        ({"kind": "folder", "path": "x"}, ["dev", "test"]),
        ({"kind": "folder", "path": "x", "holdout_every": 1}, ["test"]),
        ({"kind": "folder", "path": "x", "holdout_every": 0}, []),
        ({"kind": "fleurs"}, ["dev", "test"]),
        ({"kind": "fleurs", "splits": ["train", "dev"]}, ["dev"]),
        ({"kind": "jsonl", "train": [Path("x")], "test": [Path("y")]}, ["test"]),
        ({"kind": "synthetic"}, ["dev", "test"]),
        ({"kind": "synthetic", "minutes": {"train": 1, "dev": 0, "test": 1}}, ["test"]),
    ],
)
def test_the_sets_that_may_not_be_empty(corpus: dict[str, Any], wanted: list[str]) -> None:
    parsed: Any = TypeAdapter(Corpus).validate_python(corpus)
    assert [split for split in ("train", "dev", "test") if must_hold(parsed, split)] == wanted
