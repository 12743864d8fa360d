"""Checks a bundle where it is to run: its files, and what every precision makes of test.wav.

    python check.py [DIR]

It needs sherpa-onnx and numpy and nothing else; a copy lies in every bundle.  It compares the files
with SHA256SUMS, then recognises test.wav with sherpa-onnx's Python package and, where they are
installed, with its programs, and compares the text with that of the machine that packed the bundle.
The exit code is 0 if all is well, 1 if something differs, 2 if it is no bundle.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import wave
from pathlib import Path
from typing import Any

import numpy as np

FILE = "bundle.json"
FORMAT = 1  # of that file
SUMS = "SHA256SUMS"


def digest(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def bad_files(folder: Path) -> list[str]:
    """What is wrong with the files of a bundle, a line each."""
    problems = []
    for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
        wanted, name = line.split("  ", 1)
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif digest(path) != wanted:
            problems.append(f"{name} is damaged, cut short or of another bundle")
    return problems


def models(precision: str) -> dict[str, str]:
    """The names of a precision's files, by sherpa-onnx's names for them."""
    suffix = "" if precision == "fp32" else f".{precision}"
    parts = ("encoder", "decoder", "joiner")
    return {"tokens": "tokens.txt"} | {part: f"{part}{suffix}.onnx" for part in parts}


def read_wave(path: Path) -> tuple[np.ndarray, int]:
    """The samples of a 16-bit mono WAV file, in [-1, 1], and its rate."""
    with wave.open(str(path)) as sound:
        block = sound.readframes(sound.getnframes())
        return np.frombuffer(block, "<i2").astype(np.float32) / 32768, sound.getframerate()


def by_python(folder: Path, bundle: dict[str, Any], precision: str) -> str:
    """What sherpa-onnx's Python package makes of test.wav."""
    import sherpa_onnx

    files = {key: str(folder / name) for key, name in models(precision).items()}
    samples, rate = read_wave(folder / "test.wav")
    padded = np.concatenate([samples, np.zeros(int(bundle["tail"] * rate), dtype=np.float32)])
    if bundle["chunk_size"] == -1:
        recognizer: Any = sherpa_onnx.OfflineRecognizer.from_transducer(**files)
        stream = recognizer.create_stream()
        stream.accept_waveform(rate, padded)
        recognizer.decode_stream(stream)
        return str(stream.result.text).strip()
    recognizer = sherpa_onnx.OnlineRecognizer.from_transducer(**files, num_threads=1)
    stream = recognizer.create_stream()
    stream.accept_waveform(rate, padded)
    stream.input_finished()
    while recognizer.is_ready(stream):
        recognizer.decode_stream(stream)
    return str(recognizer.get_result(stream)).strip()


def program(chunk_size: int) -> str | None:
    """sherpa-onnx's program for such a tier, if it is installed."""
    name = "sherpa-onnx-offline" if chunk_size == -1 else "sherpa-onnx"
    beside = str(Path(sys.executable).parent)
    return shutil.which(name) or shutil.which(name, path=beside)


def command(bundle: dict[str, Any], precision: str, recording: str = "test.wav") -> list[str]:
    """The words after the program's name that make it recognise a recording."""
    options = [f"--{key}={name}" for key, name in models(precision).items()]
    if bundle["chunk_size"] != -1:
        options += ["--left-padding=0", f"--right-padding={bundle['tail']:g}"]
        options += ["--enable-endpoint=false"]
    return [*options, recording]


def by_program(folder: Path, bundle: dict[str, Any], precision: str, path: str) -> str:
    """What sherpa-onnx's program makes of test.wav; to the offline one the silence is given."""
    with tempfile.TemporaryDirectory() as temporary:
        recording = folder / "test.wav"
        if bundle["chunk_size"] == -1:
            padded = Path(temporary) / "padded.wav"
            with wave.open(str(recording)) as given, wave.open(str(padded), "wb") as longer:
                longer.setparams(given.getparams())
                silence = bytes(2 * int(bundle["tail"] * given.getframerate()))
                longer.writeframes(given.readframes(given.getnframes()) + silence)
            recording = padded
        words = [path, *command(bundle, precision, str(recording.resolve()))]
        done = subprocess.run(words, cwd=folder, capture_output=True, encoding="utf-8")
    for line in (done.stdout + "\n" + done.stderr).splitlines():
        if line.startswith("{") and '"text"' in line:
            return str(json.loads(line)["text"]).strip()
    return f"(no result, exit code {done.returncode}) {done.stderr.strip()[-200:]}"


def compare(folder: Path, bundle: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Recognises test.wav in every way; rows of engine, precision and text."""
    path = program(bundle["chunk_size"])
    rows = []
    for precision in bundle["precisions"]:
        rows.append(("sherpa-onnx, Python", precision, by_python(folder, bundle, precision)))
        if path:
            heard = by_program(folder, bundle, precision, path)
            rows.append((Path(path).name, precision, heard))
    if not path:
        print("sherpa-onnx's programs are not installed: only Python is checked")
    return rows


def read_bundle(folder: Path) -> dict[str, Any]:
    """What bundle.json says.

    Raises:
        ValueError: it is not a bundle, of another version, or its files are not as they were.
    """
    for name in (FILE, SUMS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not a bundle: it has no {name}; copy all of it again")
    if problems := bad_files(folder):
        raise ValueError(f"{folder}: copy it again: " + "; ".join(problems))
    bundle: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
    if bundle["format"] != FORMAT:
        raise ValueError(
            f"{folder / FILE} is of version {bundle['format']} and this program reads {FORMAT}: "
            f"run the check.py that lies in the bundle"
        )
    return bundle


def report(bundle: dict[str, Any], rows: list[tuple[str, str, str]]) -> int:
    """Prints what was recognised; how many texts differ from those of the packing machine."""
    differing = 0
    for engine, precision, heard in rows:
        expected = bundle["test"][precision]
        same = heard == expected
        differing += not same
        print(f"{'same' if same else 'DIFFERS':8} {engine:24} {precision:6} {heard}")
        if not same:
            print(f"{'':8} {'when it was packed':24} {'':6} {expected}")
    if differing:
        print(
            "A word that differs in a precision below fp32 may come from this processor's "
            "rounding: measure WER here. One that differs in fp32, or many words, means that the "
            "runtime is of another version or that something is wrong."
        )
    else:
        print(f"all {len(rows)} as they were when the bundle was packed")
    return differing


def main() -> int:
    """Checks the folder that is named, or the one in which this file lies."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent
    try:
        bundle = read_bundle(folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if report(bundle, compare(folder, bundle)) else 0


if __name__ == "__main__":
    sys.exit(main())
