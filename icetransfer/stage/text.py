"""Files of text that people write or change."""

from pathlib import Path


def read_text(path: Path) -> str:
    """What a file holds, in UTF-8.

    Raises:
        ValueError: it is of another encoding.
        OSError: it cannot be read.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (its byte {error.start} is not): save it as UTF-8, or bring back "
            f"what it was"
        ) from None
