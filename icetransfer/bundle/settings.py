"""`bundle.json`: what a program needs to know of a bundle besides its files.

    {
      "format": 1,
      "chunk_size": 16,
      "precisions": ["fp32", "int8"],
      "tail": 0.76,
      "test": {"fp32": "what test.wav says", "int8": "what test.wav says"},
      "sherpa_onnx": {"rule1_min_trailing_silence": 1.24, "bpe_vocab": "bpe.vocab"},
      "min_confidence": 0.55,
      "reasons": {"rule2": "..."}
    }

`sherpa_onnx` holds arguments of sherpa-onnx's `from_transducer`; options of its programs have the
same names, with hyphens.  The file is read by others without this package: see `check.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icetransfer.bundle.check import FILE, FORMAT
from icetransfer.stage import atomic
from icetransfer.stage.json_file import read_json

LANGUAGE_MODEL = "language-model.onnx"  # in bundles of models that were decoded with one

#: sherpa-onnx's own, for a model of which nothing has been measured.
RULES = {
    "rule1_min_trailing_silence": 2.4,
    "rule2_min_trailing_silence": 1.2,
    "rule3_min_utterance_length": 20.0,
}


@dataclass(frozen=True)
class Settings:
    """When a segment ends, and which segments count.

    Attributes:
        rules: sherpa-onnx's of endpoints, in seconds, as `from_transducer` names them.
        min_confidence: segments whose tokens have a lower mean probability are left out.
        reasons: of each choice, in words, and what was measured for it.
        language_model: sherpa-onnx's `lm` and `lm_scale`, or nothing.
    """

    rules: dict[str, float] = field(default_factory=lambda: dict(RULES))
    min_confidence: float = 0.0
    reasons: dict[str, Any] = field(default_factory=dict)
    language_model: dict[str, Any] = field(default_factory=dict)

    @property
    def pause(self) -> float:
        """Silence in seconds after which a segment that has words ends."""
        return self.rules["rule2_min_trailing_silence"]


def read_settings(folder: Path) -> Settings:
    """The settings of a bundle; those of sherpa-onnx where it has none, as an export has.

    Raises:
        ValueError: the file is damaged, or of another version.
    """
    path = folder / FILE
    if not path.is_file():
        return Settings()
    found = read_json(path, ["format"])
    if found["format"] != FORMAT:
        raise ValueError(
            f"{path} is of version {found['format']!r} and this icetransfer reads {FORMAT}: pack "
            f"the bundle again (stage 11), or use the icetransfer that made it"
        )
    found = read_json(path, ["sherpa_onnx", "min_confidence", "reasons"])
    if lacks := [rule for rule in RULES if rule not in found["sherpa_onnx"]]:
        raise ValueError(f"{path} lacks {lacks[0]} in sherpa_onnx: pack the bundle again")
    rules = {rule: float(found["sherpa_onnx"][rule]) for rule in RULES}
    language_model = {}
    if name := found["sherpa_onnx"].get("lm"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing: copy the bundle again")
        language_model = {"lm": str(folder / name), "lm_scale": found["sherpa_onnx"]["lm_scale"]}
    return Settings(rules, float(found["min_confidence"]), found["reasons"], language_model)


def write_settings(folder: Path, settings: Settings, **more: Any) -> None:
    """Writes bundle.json: the settings and what else is known."""
    tree = {"format": FORMAT, **more}
    tree["sherpa_onnx"] = settings.rules | more.get("sherpa_onnx", {})
    tree |= {"min_confidence": settings.min_confidence, "reasons": settings.reasons}
    text = json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
    atomic.write_text(folder / FILE, text)
