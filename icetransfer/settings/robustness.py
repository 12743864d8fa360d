"""The conditions under which test sets are decoded besides: `robustness` in the config."""

import re
from typing import Literal, get_args

from pydantic import Field, field_validator

from icetransfer.settings.section import Section

Condition = Literal[
    "softer-20dB",
    "softer-40dB",
    "softer-50dB",
    "clipped-20dB",
    "silence-before",
    "silence-inside",
    "silence-after",
    "breath-before",
    "breath-inside",
    "breath-after",
    "room-noise-before",
    "room-noise-inside",
    "room-noise-after",
    "telephone",
    "opus",
    "noise-20dB",
    "noise-10dB",
    "noise-0dB",
    "small-room",
    "large-room",
    "slower-10%",
    "faster-10%",
    "hum",
    "dc",
]
CONDITIONS: tuple[str, ...] = get_args(Condition)


class Robustness(Section):
    """Test sets decoded as if recorded elsewhere: at stage 9, after the test sets themselves."""

    enabled: bool = True
    """Whether this is done."""
    conditions: tuple[Condition, ...] | None = None
    """Those to decode under, see docs/robustness.md; null: all."""
    commands: dict[str, str] = Field({})
    """More of them: a name, and a command that reads WAV from its input and writes WAV."""
    chunk_size: int | None = None
    """The tier, one of `decode.chunk_sizes`; null: 16 (320 ms), or else the shortest there is."""
    seed: int = 1
    """Of noise, breath and rooms."""

    @field_validator("commands")
    @classmethod
    def _check_names(cls, commands: dict[str, str]) -> dict[str, str]:
        for name, command in commands.items():
            if not re.fullmatch(r"[\w.%+-]+", name) or name in CONDITIONS:
                raise ValueError(
                    f"{name!r} cannot be the name of a condition: expected letters, digits and "
                    f"hyphens, and none of {', '.join(CONDITIONS)}"
                )
            if not command.strip():
                raise ValueError(f"the command of {name} is empty")
        return commands
