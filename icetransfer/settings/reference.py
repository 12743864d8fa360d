"""The reference of config keys, as rows, on a terminal and in Markdown."""

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from icetransfer.settings.augment import AUGMENTATION_CLASSES
from icetransfer.settings.corpora import CORPUS_CLASSES
from icetransfer.settings.section import Hours
from icetransfer.settings.tree import leaves, longest_prefix

CORPUS = "data.corpora.NAME"  # a corpus, whose name is the user's
AUGMENTATION = "train.augment"  # each of a list
# The stages that read a key: those of the longest prefix here.  Writing it into a result's wer.json
# or a model card is reading it; the seed in every stage's provenance is not.
STAGES = {
    "language": "0, 1, 9-11",
    "init": "5, 6, 9-11",
    "hours": "3-6, 8-11",
    "seed": "5, 6, 9-11",
    "data.dir": "0-6, 8, 9, 11",
    "data.corpora.NAME.kind": "0, 1, 9-11",
    "data.corpora.NAME.language": "0, 1, 9-11",
    "data.corpora.NAME.path": "0, 1",
    "data.corpora.NAME.domain": "0",
    "data.corpora.NAME.minutes": "0",
    "data.corpora.NAME.seed": "0",
    "data.corpora.NAME.codec": "0, 1",
    "data.corpora.NAME.holdout_by": "1",
    "data.corpora.NAME.holdout_every": "1",
    "data.corpora.NAME.splits": "0, 1, 9-11",
    "data.corpora.NAME.train": "0, 1",
    "data.corpora.NAME.dev": "0, 1, 9-11",
    "data.corpora.NAME.test": "0, 1, 9-11",
    "data.tokens": "4",
    "data.vocab_size": "4",
    "data.tokenizer_text": "4",
    "data.text": "8",
    "data.features": "2",
    "data.features.jobs": "1, 2",
    "data.keep_apart": "3",
    "data.min_seconds": "1, 3",
    "data.max_seconds": "1, 3, 6",
    "transfer": "5",
    "transfer.parts": "5, 6",
    "transfer.adapters": "5, 6",
    "train": "6",
    "train.max_steps": "6, 7, 11",
    "train.chunk_sizes": "5, 6",
    "train.left_context_frames": "5, 6",
    "train.average_fraction": "6, 7",
    "export": "8",
    "remedy": "10",
    "language_model": "8",
    "decode.splits": "9-11",
    "decode.engines": "9-11",
    "decode.precisions": "8-11",
    "decode.chunk_sizes": "8-11",
    "decode.left_context_frames": "8-11",
    "decode.search": "9-11",
    "decode.beam": "9",
    "decode.hotwords": "9",
    "decode.hotwords_score": "9",
    "decode.language_model_scale": "9",
    "decode.batch_streams": "9",
    "decode.latency": "9, 10",
    "robustness": "9",
    "bundle": "11",
}


@dataclass(frozen=True)
class Key:
    """A config key.

    Attributes:
        name: dotted; NAME stands for a corpus's own.
        type: as a person would write it.
        default: as YAML would have it; "required" where there is none.
        text: its line.
        stages: that read it.
    """

    name: str
    type: str
    default: str
    text: str
    stages: str


def stages_of(name: str) -> str:
    """The stages that read a key; empty for one that no prefix covers."""
    return longest_prefix(STAGES, name, "")


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """Every key of a section, in the order of its fields."""
    # `kind` first, which in the sections of corpora comes after what they inherit.
    fields = sorted(section.model_fields.items(), key=lambda item: item[0] != "kind")
    for name, field in fields:
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{prefix}{name}.")
        elif f"{prefix}{name}" == "data.corpora":
            for corpus in CORPUS_CLASSES:
                yield from keys(corpus, f"{CORPUS}.")
        else:
            if f"{prefix}{name}" == AUGMENTATION:
                for augmentation in AUGMENTATION_CLASSES:
                    yield from keys(augmentation, f"{AUGMENTATION}.")
            yield Key(
                prefix + name,
                type_name(field.annotation),
                _default(field),
                field.description or "",
                stages_of(prefix + name),
            )


def type_name(annotation: Any) -> str:
    """A type as a person would write it: "number", "one of a, b", "list of number"."""
    simple = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path"}
    if annotation in simple:
        return simple[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation == Hours:
        return "hours"
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if type(None) in arguments:
        return type_name(next(a for a in arguments if a is not type(None)))
    if origin is tuple:
        same = arguments[1:] == (...,) or len({*arguments}) == 1
        return f"list of {type_name(arguments[0])}" if same else "list"
    if origin is UnionType:
        return "section"
    if origin is dict:
        return f"{type_name(arguments[0])}: {type_name(arguments[1])}"
    return type_name(arguments[0])  # Annotated: its checks are for the message of an error


def value_text(value: Any) -> str:
    """A value as YAML has it on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(value_text, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {value_text(own)}" for key, own in value.items()) + "}"
    return str(value)


def _default(field: FieldInfo) -> str:
    return "required" if field.is_required() else value_text(field.default)


def markdown(section: type[BaseModel]) -> str:
    """The reference as a page: a table for each part of the tree and each kind of corpus."""
    tables: dict[str, list[Key]] = {}
    kind = ""
    for key in keys(section):
        folder = key.name.rpartition(".")[0]
        for listed in (CORPUS, AUGMENTATION):
            if folder.startswith(listed):
                kind = key.type if key.name == f"{listed}.kind" else kind
                folder = f"{listed} of kind {kind}"
        tables.setdefault(folder, []).append(key)
    lines = [
        "# Every config key",
        "",
        "A recipe's YAML files set keys, and `key=value` words on the command line of `run.sh`.",
        "`python -m icetransfer.config --exp DIR` says what an experiment sets. The stages are the",
        "ones of `run.sh` that read the key. NAME is any name that you give to a corpus.",
        "",
        "`python -m icetransfer.config --markdown` made this page from `icetransfer/config.py` and",
        "`icetransfer/settings/`.",
    ]
    for folder, rows in tables.items():
        lines += ["", f"## {folder or 'The tree'}", ""]
        lines += ["| key | type | default | stages | |", "|---|---|---|---|---|"]
        for row in rows:
            cells = (f"`{row.name}`", row.type, row.default, row.stages, row.text)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def terminal(rows: Iterable[Key], width: int) -> Iterator[str]:
    """The reference as lines of text: the key and its default, then its line, type and stages."""
    for row in rows:
        yield f"{row.name} = {row.default}"
        for text in (row.text, f"{row.type}; stages {row.stages}"):
            indent = " " * 4
            yield from textwrap.wrap(
                text, max(width, 40), initial_indent=indent, subsequent_indent=indent
            )


def set_keys(
    tree: Mapping[str, Any], defaults: Mapping[str, Any], origins: Mapping[str, str] | None
) -> Iterator[str]:
    """What a tree sets, one line each: "train.lr = 0.02  (conf/public.yaml)".

    A key that nobody set and whose value is not the default had another default at the time.
    Without origins, what differs from the defaults.

    Args:
        tree: resolved.
        defaults: the values of the keys that have one, dotted.
        origins: where keys came from, dotted; None where that was not recorded.
    """
    otherwise = "not recorded" if origins is None else "an earlier default"
    for key, value in leaves(tree):
        origin = (origins or {}).get(key)
        if origin or key not in defaults or defaults[key] != value:
            yield f"{key} = {value_text(value)}  ({origin or otherwise})"
