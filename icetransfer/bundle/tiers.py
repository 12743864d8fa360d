"""The tiers of a bundle as they lie in a folder, and how one is opened to listen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from icetransfer.bundle.settings import read_settings
from icetransfer.config import chunk_ms
from icetransfer.stage.json_file import read_json
from icetransfer.streaming.exported import Exported, read_tokens
from icetransfer.streaming.hotwords import Hotword
from icetransfer.streaming.segments import Listener, OfflineListener, StreamingListener
from icetransfer.streaming.sherpa import SherpaRecognizer
from icetransfer.streaming.streams import tail_seconds


def find_tiers(folder: Path) -> tuple[dict[str, tuple[Exported, int]], list[str]]:
    """The tiers that a folder is or holds.

    Args:
        folder: a bundle of stage 11, an export of stage 8, or a folder of these.

    Returns:
        By latency, "160" (ms) or "offline": the tier and its chunk size, -1 for offline.  And what
        is wrong with tiers that are half written or damaged.

    Raises:
        ValueError: there is no tier at all.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder; expected what stage 8 exports, or a bundle of stage 11"
        )
    inside = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    tiers, broken = {}, []
    for bundle in (Exported(path) for path in (folder, *inside)):
        if not any(bundle.dir.glob("*.onnx")):
            continue
        try:
            size = _chunk_size(bundle)
            tiers["offline" if size == -1 else str(chunk_ms(size))] = (bundle, size)
        except (ValueError, OSError) as error:
            broken.append(str(error))
    if not tiers and not broken:
        raise ValueError(
            f"{folder} is not a bundle and holds none, there are no *.onnx; expected what stage 8 "
            f"exports, or a bundle of stage 11"
        )
    return tiers, broken


def _chunk_size(bundle: Exported) -> int:
    """Of an export, by its description, or else by what its encoder says of itself."""
    made_of = {}
    if bundle.description.is_file():
        made_of = read_json(bundle.description, ["made_of"])["made_of"]
    if "chunk_size" in made_of:
        return int(made_of["chunk_size"])
    return bundle.inspect(precisions_of(bundle)[0]).chunk_size


def precisions_of(bundle: Exported) -> list[str]:
    """The precisions that there are, fp32 first.

    Raises:
        ValueError: there is none.
    """
    parts = (path.name.split(".")[1:-1] for path in bundle.dir.glob("encoder*.onnx"))
    found = sorted((part[0] if part else "fp32" for part in parts), key=lambda p: (p != "fp32", p))
    if not found:
        raise ValueError(f"{bundle.dir} has no encoder: it is half written; copy or make it again")
    return found


def open_tier(
    bundle: Exported,
    chunk_size: int,
    precision: str,
    blank_penalty: float = 0.0,
    min_confidence: float | None = None,
    hotwords: Sequence[Hotword] = (),
    use_language_model: bool = True,
) -> Callable[[], Listener]:
    """Loads a tier; what is returned begins a recording.

    Args:
        bundle: the tier.
        chunk_size: in 50 Hz frames; -1 is offline.
        precision: one that it has.
        blank_penalty: sherpa-onnx's.
        min_confidence: below which a segment is left out; None for the bundle's own.
        hotwords: phrases to expect.
        use_language_model: the bundle's, where it has one.

    Raises:
        ValueError: its files are missing or broken, or of another version.
    """
    settings = read_settings(bundle.dir)
    names = read_tokens(bundle.tokens)
    options: dict[str, Any] = {"blank_penalty": blank_penalty}
    if chunk_size != -1:
        options |= settings.rules | {"enable_endpoint_detection": True}
    language_model = settings.language_model if use_language_model else {}
    recognizer = SherpaRecognizer(
        bundle.dir,
        chunk_size,
        precision,
        search="modified_beam_search" if hotwords or language_model else "greedy_search",
        tail_seconds=tail_seconds(chunk_size),
        options=options | language_model,
        hotwords=hotwords,
    )
    least = settings.min_confidence if min_confidence is None else min_confidence
    kind = OfflineListener if chunk_size == -1 else StreamingListener
    return lambda: kind(recognizer, names, settings.pause, least)
