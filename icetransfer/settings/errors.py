"""What a bad config is told: the key, what was expected of it, the nearest right name."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from icetransfer.settings.augment import AUGMENTATION_CLASSES
from icetransfer.settings.corpora import CORPUS_CLASSES, Corpus

# What was expected, by the beginning of pydantic's name for the error and its facts.
Context = Mapping[str, Any]
EXPECTED: dict[str, Callable[[Context], str]] = {
    "literal_error": lambda facts: str(facts["expected"]),
    "union_tag_invalid": lambda facts: f"kind to be one of {facts['expected_tags']}",
    "union_tag_not_found": lambda _: "a kind, as in {kind: folder}",
    "greater_than_equal": lambda facts: f"{facts['ge']:g} or more",
    "greater_than": lambda facts: f"more than {facts['gt']:g}",
    "less_than_equal": lambda facts: f"at most {facts['le']:g}",
    "less_than": lambda facts: f"less than {facts['lt']:g}",
    "finite_number": lambda _: "a finite number",
    "int": lambda _: "a whole number",
    "float": lambda _: "a number",
    "bool": lambda _: "true or false",
    "string": lambda _: "text",
    "path": lambda _: "a path",
    "dict": lambda _: "keys and values, as {key: value}",
    "model": lambda _: "keys and values, as {key: value}",
    "tuple": lambda _: "a list, as [a, b]",
    "list": lambda _: "a list, as [a, b]",
    "too_short": lambda facts: f"a list of {facts['min_length']} or more",
    "too_long": lambda facts: f"a list of at most {facts['max_length']}",
    "missing": lambda _: "another element in this list",
}
HOURS = "an amount of data, as 8min, 100h or 100"


def known_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key of a section, dotted; that of a corpus stands under NAME."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
        elif field.annotation == dict[str, Corpus]:
            for corpus in CORPUS_CLASSES:
                keys += known_keys(corpus, f"{prefix}{name}.NAME.")
        elif name == "augment":
            for augmentation in AUGMENTATION_CLASSES:
                keys += known_keys(augmentation, f"{prefix}{name}.")
    return keys


def describe_errors(error: ValidationError, section: type[BaseModel], prefix: str = "") -> str:
    """Turns pydantic's errors into lines that a user can act on; keys begin with the prefix."""
    known = known_keys(section, prefix)
    lines: dict[str, str] = {}
    for item in error.errors():
        parts = [str(part) for part in item["loc"]]
        if parts[:2] == ["data", "corpora"]:
            # pydantic puts the tag of the union ("synthetic") after the name: users never type it
            del parts[3:4]
        elif parts[:2] == ["train", "augment"]:
            del parts[2:4]
        key = prefix + ".".join(parts)
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            lines[key] = f"unknown config key {key}{hint}"
        elif item["type"] == "missing" and not parts[-1].isdigit():
            lines[key] = f"config key {key} is required and not set"
        elif item["type"] != "too_short" or not any(x.startswith(f"{key}.") for x in lines):
            # Elements that are refused are not counted: of them alone something is said.
            where = f"config key {key}: " if key else ""
            lines.setdefault(key, f"{where}{_expected(item, parts)}")
    return "\n".join(lines.values())


def _expected(item: ErrorDetails, parts: list[str]) -> str:
    """What was expected of a value, in our words, and what it is."""
    if item["type"] == "value_error":
        said = item["msg"].removeprefix("Value error, ")
    else:
        facts = item.get("ctx", {})
        kinds = (kind for kind in EXPECTED if item["type"].startswith(kind))
        kind = next(kinds, None)
        if "hours" in parts and kind == "float":
            said = f"expected {HOURS}"
        else:
            said = f"expected {EXPECTED[kind](facts)}" if kind else "expected another kind of value"
    return said if isinstance(item["input"], dict) else f"{said} (got {_typed(item['input'])})"


def _typed(value: object) -> str:
    """A value as a user types it."""
    return value if isinstance(value, str) and value else repr(value)
