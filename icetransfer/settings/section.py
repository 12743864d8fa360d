"""A part of the config tree, and the kinds of values that several parts have."""

import re
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """A part of the tree: every key is known, every value is checked, nothing changes later.

    A string below a field is its line in the reference of keys (`python -m icetransfer.config`).
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


def parse_hours(value: object) -> object:
    """Turns "8min" or "100h" into hours; leaves anything else to the field's own check."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*(min|h)\s*", value) if isinstance(value, str) else None
    if match is None:
        return value
    return float(match[1]) / (60 if match[2] == "min" else 1)


Split = Literal["train", "dev", "test"]
Hours = Annotated[float, BeforeValidator(parse_hours), Field(gt=0)]
