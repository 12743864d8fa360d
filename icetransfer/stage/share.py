"""A stage's work divided among processes, on one host or several: each does some shards."""

import argparse
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """The shards that a process is to do: every `of`-th, from the `number`-th on.

    Attributes:
        number: from 1.
        of: how many shares there are; with one, its process also joins the shards.
    """

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> "Share":
        """Reads "2/3".

        Raises:
            argparse.ArgumentTypeError: it is written in another way.
        """
        match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise argparse.ArgumentTypeError(
                f"expected K/N with K from 1 to N, as 2/3, got {text!r}"
            )
        return cls(int(match[1]), int(match[2]))

    @property
    def is_all(self) -> bool:
        """Whether there is no other."""
        return self.of == 1

    def has(self, shard: int) -> bool:
        """Whether a shard, counted from 0, is in it."""
        return shard % self.of == self.number - 1


ALL = Share()
