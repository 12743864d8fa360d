"""Config trees as YAML gives them: nested mappings, before and after they are checked."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from icetransfer.stage.text import read_text

# The parser in C, where PyYAML has it: the same trees, ten times as fast.
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# What is cut short is YAML too, often, and the defaults would stand in for what is lost.
SAVED_FIRST, SAVED_LAST = "# A resolved config: whole if it ends with three dots.\n", "...\n"
COMMAND_LINE = "the command line"

Value = TypeVar("Value")


def read_trees(files: Iterable[Path], overrides: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """The trees of YAML files, then of key=value words, each with where it comes from.

    Raises:
        ValueError: a file is missing or not YAML, or a word is not key=value.
    """
    for file in files:
        yield str(file), _read_yaml(file)
    for override in overrides:
        yield COMMAND_LINE, _parse_override(override)


def merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """The first tree with the second laid over it."""
    merged = dict(base)
    for key, value in over.items():
        if value is None and isinstance(merged.get(key), Mapping):
            del merged[key]  # "slots: null" takes a corpus of an earlier file out
        elif isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key that holds a value, dotted, and the value; an empty mapping is one."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def longest_prefix(table: Mapping[str, Value], key: str, default: Value) -> Value:
    """What a table says of a dotted key: the entry of its longest prefix there."""
    parts = key.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((table[prefix] for prefix in prefixes if prefix in table), default)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lists the keys in which two trees differ, one line each: "train.lr: 0.045 -> 0.02"."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before} -> {after}")
    return lines


def _read_yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"config file {file} does not exist")
    try:
        text = read_text(file)
        if text.startswith(SAVED_FIRST) and not text.endswith(SAVED_LAST):
            raise ValueError(f"{file} is cut short: restore it, or begin a new experiment")
        tree = yaml.load(text, YAML_LOADER) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"config file {file} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"config file {file} must hold keys and values, not {type(tree).__name__}")
    return tree


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"expected key=value (as in train.max_steps=500), got {override!r}")
    try:
        tree: Any = yaml.load(text, YAML_LOADER)
    except yaml.YAMLError:
        raise ValueError(f"the value of {key} is not YAML: {text!r}") from None
    for name in reversed(key.split(".")):
        tree = {name: tree}
    merged: dict[str, Any] = tree
    return merged
