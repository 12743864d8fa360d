"""The augmentations that `train.augment` may list, each with its settings, and the named lists."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from icetransfer.settings.section import Section

Pair = tuple[float, float]


class Augmentation(Section):
    """What is done to some of the training cuts."""

    probability: float = Field(0.5, gt=0, le=1)
    """That it is done to a cut."""

    @model_validator(mode="after")
    def _check_pairs(self) -> "Augmentation":
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) == 2 and value[0] > value[1]:
                raise ValueError(f"{name} is [lowest, highest], got {list(value)}")
        return self


class Level(Augmentation):
    """Softer, or louder up to clipping."""

    kind: Literal["level"]
    """Softer, or louder up to clipping."""
    db: Pair = (-45, 20)
    """Decibels, drawn evenly between these."""


class Silence(Augmentation):
    """Digital silence or faint noise before the speech, after it, or both."""

    kind: Literal["silence"]
    """Digital silence, faint noise or breath before the speech, after it, or both."""
    seconds: Pair = (0.1, 2)
    """Of each pause, drawn evenly between these."""
    db: Pair = (-70, -35)
    """Level of the noise against full scale, drawn evenly between these."""


class Noise(Augmentation):
    """Noise behind the speech: generated, or recordings such as MUSAN's."""

    kind: Literal["noise"]
    """Noise behind the speech: generated, or recordings such as MUSAN's."""
    path: Path | None = None
    """A folder of audio, or a lhotse manifest of recordings; null: generated noise."""
    snr: Pair = (5, 25)
    """Signal to noise in dB, drawn evenly between these."""


class Room(Augmentation):
    """The echo of a room: simulated, or by recorded impulse responses."""

    kind: Literal["room"]
    """The echo of a room: simulated, or by recorded impulse responses."""
    path: Path | None = None
    """A folder of impulse responses, or a lhotse manifest of them; null: simulated rooms."""


class Codec(Augmentation):
    """What a line does to speech."""

    kind: Literal["codec"]
    """What a line does to speech."""
    names: tuple[Literal["telephone", "opus"], ...] = Field(("telephone",), min_length=1)
    """Drawn from these; opus is slow, and needs data.features.store=on_the_fly."""


AUGMENTATION_CLASSES = (Level, Silence, Noise, Room, Codec)
AnyAugmentation = Level | Silence | Noise | Room | Codec

# In the order of nature: a voice in a room, pauses and noise around it, a line, a volume control.
NAMED: dict[str, tuple[AnyAugmentation, ...]] = {
    "none": (),
    "default": (
        Room(kind="room", probability=0.05),
        Silence(kind="silence", probability=0.25),
        Noise(kind="noise", probability=0.15),
        Codec(kind="codec", probability=0.1),
        Level(kind="level", probability=0.4),
    ),
    "strong": (
        Room(kind="room", probability=0.4),
        Silence(kind="silence", probability=0.5),
        Noise(kind="noise", probability=0.6, snr=(0, 20)),
        Codec(kind="codec", probability=0.3),
        Level(kind="level", probability=0.8, db=(-50, 25)),
    ),
}


def _listed(value: object) -> object:
    """The list that a name stands for; leaves anything else to the field's own check."""
    if not isinstance(value, str):
        return value
    if value not in NAMED:
        raise ValueError(f"expected {', '.join(NAMED)}, or a list of augmentations")
    return NAMED[value]


Augmentations = Annotated[
    tuple[Annotated[AnyAugmentation, Field(discriminator="kind")], ...], BeforeValidator(_listed)
]
