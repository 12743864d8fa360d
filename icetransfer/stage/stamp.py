"""Whether a stage's output was made from what is there now.

A stamp is a file beside an output.  It holds what the stage has read, by name: digests of files,
values of settings, the version of the stage's own format.  A stage whose stamp says the same is
done; else it names what has changed and runs again, and the stages after it follow, because
their stamps hold digests of its output.  An output without a stamp is of an earlier version, and is
taken as it is.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from icetransfer.stage import atomic
from icetransfer.stage.json_file import read_json

log = logging.getLogger("icetransfer")

_SHOWN = 5


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def known_sha256(path: Path) -> str | None:
    """The SHA-256 of a file; None of one that is not there, which says nothing."""
    return sha256(path) if path.is_file() else None


def digests(paths: Iterable[Path]) -> dict[str, str | None]:
    """`known_sha256` of files, by name."""
    return {path.name: known_sha256(path) for path in paths}


@dataclass(frozen=True)
class Stamp:
    """What an output is made from.

    Attributes:
        path: of the stamp.
        inputs: digests and values, by name; None for what is not at hand any more, which is not
            held against an output that is.
    """

    path: Path
    inputs: Mapping[str, str | None]

    def changed(self) -> list[str]:
        """The inputs that are others than those the output was made from; none without a stamp."""
        if not self.path.is_file():
            return []
        before: dict[str, str | None] = read_json(self.path, ())
        names = sorted(before.keys() | self.inputs.keys())
        pairs = [(before.get(name, ""), self.inputs.get(name, "")) for name in names]
        return [
            name
            for name, (old, new) in zip(names, pairs, strict=True)
            if None not in (old, new) and old != new
        ]

    def is_current(self, *outputs: Path) -> bool:
        """Whether all outputs are there and were made from these inputs; says what has changed."""
        if not all(output.is_file() for output in outputs):
            return False
        changed = self.changed()
        if changed:
            more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
            log.info(
                "%s was made from something else: changed since: %s%s; making it again",
                outputs[0], ", ".join(changed[:_SHOWN]), more,
            )  # fmt: skip
        return not changed

    def renew(self, *outputs: Path) -> None:
        """Removes outputs that were made from something else; the stage writes them next.

        In this order, a stage that is killed at any moment leaves no output with a wrong stamp, and
        none without.
        """
        for output in outputs:
            output.unlink(missing_ok=True)
        atomic.write_text(self.path, json.dumps(dict(self.inputs), indent=1) + "\n")
