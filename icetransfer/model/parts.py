"""Parts of a model, as a config names them: `encoder`, `encoder.encoders.0-2`, `joiner`.

A part is a prefix of parameter names, in whole components; a component `0-2` stands for 0, 1 and 2.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


def is_in(name: str, part: str) -> bool:
    """Whether a parameter belongs to a part."""
    own, wanted = name.split("."), part.split(".")
    return len(own) >= len(wanted) and all(map(_fits, own, wanted))


def _fits(component: str, wanted: str) -> bool:
    bounds = re.fullmatch(r"(\d+)-(\d+)", wanted)
    if bounds is None or not component.isdigit():
        return component == wanted
    return int(bounds[1]) <= int(component) <= int(bounds[2])


def require_matches(parts: Iterable[str], names: Iterable[str], key: str) -> None:
    """Refuses a part that no parameter belongs to.

    Args:
        parts: as the config has them.
        names: of the parameters.
        key: of the config, for the message.

    Raises:
        ValueError: naming the part and the nearest one there is.
    """
    names = list(names)
    known = {name.rsplit(".", i)[0] for name in names for i in range(name.count(".") + 1)}
    for part in parts:
        if not any(is_in(name, part) for name in names):
            near = difflib.get_close_matches(part, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{key}: the part {part} matches no parameter of the model{hint}")


def by_parameter(
    values: Mapping[str, T], names: Iterable[str], default: T, key: str
) -> dict[str, T]:
    """The value of each parameter: that of the most specific part which it belongs to.

    Args:
        values: by part.
        names: of the parameters.
        default: for those in no part.
        key: of the config, for the message.

    Raises:
        ValueError: a part that no parameter belongs to.
    """
    names = list(names)
    require_matches(values, names, key)
    general_first = sorted(values, key=lambda part: part.count("."))
    found = dict.fromkeys(names, default)
    for part in general_first:
        found |= {name: values[part] for name in names if is_in(name, part)}
    return found
