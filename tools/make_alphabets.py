"""Writes icetransfer/data/text/alphabets.yaml from the Unicode CLDR, for `tools/new_recipe.sh`.

    python tools/make_alphabets.py FOLDER

FOLDER is the unpacked npm package cldr-misc-full. A language's alphabet is its main exemplar set,
in lower case; those of more than 300 characters (Chinese, Japanese, Korean) are left out. An
apostrophe of any shape that is a letter (Ukrainian, Uzbek) is written '.
"""

import json
import re
import sys
import unicodedata
from pathlib import Path

import yaml

TARGET = Path(__file__).resolve().parents[1] / "icetransfer/data/text/alphabets.yaml"
MOST = 300
HEAD = """\
# The letters of languages: the main exemplar characters of the Unicode CLDR {version}, lower case.
# Written by tools/make_alphabets.py. Data: Copyright (c) 1991-2026 Unicode, Inc., used under the
# Unicode License v3, https://www.unicode.org/license.txt
"""


def letters(exemplars: str) -> str:
    """The characters of a CLDR exemplar set such as "[a á b {ch} x-z]", sorted."""
    text = re.sub(r"\\u([0-9A-Fa-f]{4})", lambda m: chr(int(m[1], 16)), exemplars[1:-1])
    text = re.sub(r"(?<!\\)[{}\s]", "", text).replace("\\", "")
    text = re.sub("(.)-(.)", lambda m: "".join(map(chr, range(ord(m[1]), ord(m[2]) + 1))), text)
    lower = text.replace("İ", "i").lower()  # Python writes it as i with a combining dot
    lower = re.sub("[ʼʻ’‘]", "'", unicodedata.normalize("NFC", lower))
    return "".join(sorted({char for char in lower if char == "'" or char.isalpha() or _mark(char)}))


def _mark(char: str) -> bool:
    return unicodedata.category(char).startswith("M")


def main() -> None:
    """Reads every locale, and keeps those that differ from the one they inherit from."""
    folder = Path(sys.argv[1])
    version = json.loads((folder / "package.json").read_text(encoding="utf-8"))["version"]
    alphabets: dict[str, str] = {}
    for path in sorted((folder / "main").glob("*/characters.json")):
        code = path.parent.name
        characters = json.loads(path.read_text(encoding="utf-8"))["main"][code]["characters"]
        found = letters(characters["exemplarCharacters"])
        if code != "und" and found and len(found) <= MOST:
            alphabets[code] = found
    for code in sorted(alphabets, key=len, reverse=True):
        parent = code.rpartition("-")[0]
        if alphabets.get(parent) == alphabets[code]:
            del alphabets[code]
    body = yaml.safe_dump(alphabets, allow_unicode=True, width=10_000)
    TARGET.write_text(HEAD.format(version=version) + body, encoding="utf-8")


if __name__ == "__main__":
    main()
