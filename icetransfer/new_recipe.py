"""Makes a recipe for a new language: a copy of egs/TEMPLATE, and text rules from the CLDR.

    tools/new_recipe.sh CODE [NAME]

CODE is the language's code as in BCP 47 (cy, tr, sr-Latn); NAME is how people call it, by default
its English name. Nothing that exists is overwritten. The text rules, `egs/<code>/local/text.yaml`,
begin as the Unicode CLDR's alphabet of the language: a native speaker should read them, and what
`egs/<code>/README.md` lists, before results are believed.
"""

import argparse
import difflib
import re
import shutil
import tempfile
from pathlib import Path

import yaml
from babel import Locale, UnknownLocaleError
from babel.numbers import get_decimal_symbol, get_group_symbol
from num2words import CONVERTER_CLASSES, num2words

from icetransfer.data.text.normalizer import LANGUAGE_FOLDER
from icetransfer.experiment import main

REPO = Path(__file__).parents[1]
ALPHABETS = Path(__file__).parent / "data/text/alphabets.yaml"

# Languages that write a small i with and without a dot: Unicode's own lower case mixes them.
_DOTTED_I = {"az", "tr", "tt", "crh", "gag", "kk-Latn"}


def make_recipe(root: Path, code: str, name: str | None = None) -> Path:
    """Makes `egs/<code>`.

    Args:
        root: The repository's folder.
        code: BCP 47: a language, perhaps with a script and a region.
        name: What to call the language; None for its English name.

    Returns:
        The recipe's folder.

    Raises:
        ValueError: The code is none, the name is not a line of text, or the recipe exists.
    """
    name = _check(code, name)
    recipe = root / "egs" / code
    if recipe.exists():
        raise ValueError(f"egs/{code} is there already; edit it, or choose another code")
    with tempfile.TemporaryDirectory(dir=root / "egs", prefix=".new.") as folder:
        new = Path(folder) / code
        shutil.copytree(root / "egs/TEMPLATE", new)
        for path in sorted(new.rglob("*")):
            if path.is_file():
                text = path.read_text(encoding="utf-8")
                path.write_text(
                    text.replace("@CODE@", code).replace("@LANGUAGE@", name), encoding="utf-8"
                )
        if not (LANGUAGE_FOLDER / f"{code}.yaml").exists():
            rules = new / "local/text.yaml"
            rules.parent.mkdir(exist_ok=True)
            rules.write_text(text_rules(code, name), encoding="utf-8")
        new.rename(recipe)
    return recipe


def _check(code: str, name: str | None) -> str:
    """Returns the language's name."""
    if not re.fullmatch(r"[a-z]{2,3}(-[A-Z][a-z]{3})?(-([A-Z]{2}|\d{3}))?", code):
        raise ValueError(
            f"the code must be one of BCP 47: a language in small letters, perhaps with a script "
            f"and a region (cy, sr-Latn, pt-BR), got {code!r}"
        )
    if name is not None and (not name.strip() or "\n" in name):
        raise ValueError('the name must be one line of text, as in "Welsh"')
    english = dict(Locale("en").languages)
    language = code.partition("-")[0]
    if language in english:
        return name or _full_name(code, english[language])
    # The registry of three-letter codes holds thousands more than the CLDR has names for.
    if len(language) == 3 and name is not None:
        print(f"the CLDR has no language {language}: its code was not checked")
        return name
    by_name = {english_name: known for known, english_name in english.items()}
    near = difflib.get_close_matches(name or "", by_name, 1)
    hint = f"{near[0]} is {by_name[near[0]]}" if near else "see iso639-3.sil.org for codes"
    raise ValueError(f"{language} is no language that the CLDR knows; {hint}")


def _full_name(code: str, english: str) -> str:
    """The English name, with script and region: "Serbian (Latin)"."""
    _, *more = code.split("-")
    locale = Locale("en")
    names = {**locale.scripts, **locale.territories}
    named = [names.get(part, part) for part in more]
    return f"{english} ({', '.join(named)})" if named else english


def text_rules(code: str, name: str) -> str:
    """Text rules of a language, as YAML, with comments for the one who reads them first.

    Args:
        code: BCP 47.
        name: What to call the language.
    """
    alphabets: dict[str, str] = yaml.safe_load(ALPHABETS.read_text(encoding="utf-8"))
    letters = next((alphabets[part] for part in _broader(code) if part in alphabets), "")
    letters = letters.replace("'", "")  # which `apostrophe` keeps
    lines = [
        f"# Text rules of {name}, for icetransfer/data/text/normalizer.py.",
        "# A native speaker should check them.",
        f"name: {_quoted(name)}",
    ]
    if letters:
        lines += ["# The CLDR's. Training sentences with other letters are dropped and counted."]
    else:
        lines += [
            "# The CLDR knows no alphabet of this language: write all its small letters here."
        ]
    lines += [f"alphabet: {_quoted(letters)}"]
    if code in _DOTTED_I or code.partition("-")[0] in _DOTTED_I:
        lines += ["lower: {I: ı, İ: i}"]
    lines += [
        "apostrophe: keep  # inside words: keep, or remove",
        "hyphen: space  # inside words: keep, or a space",
        *_number_rules(code),
    ]
    return "\n".join(lines) + "\n"


def _number_rules(code: str) -> list[str]:
    """Comments that say how numbers can be read out."""
    lines = [
        "# Digits and symbols are left as they are, and training sentences with them are dropped,",
        "# until `numbers` says how they are read out: icetransfer/data/text/numerals.py explains.",
    ]
    language = code.partition("-")[0]
    locale = _locale(code)
    if language not in CONVERTER_CLASSES or locale is None:
        return [*lines, "# num2words, which does the reading, does not know this language."]
    group = get_group_symbol(locale).replace("\u202f", " ").replace("\u00a0", " ")
    return [
        *lines,
        "# A start: complete what is empty, look at what num2words writes, and uncomment.",
        "# numbers:",
        f"#   num2words: {language}",
        f"#   locale: {locale}",
        f"#   decimal: {_quoted(get_decimal_symbol(locale))}",
        f"#   thousands: {_quoted(group)}",
        f"#   point: {_quoted(_spoken_point(language))}",
        "#   fraction: digits",
        f"#   minus: {_quoted(_spoken_minus(language))}",
        "#   currencies: {}",
        "#   symbols: {}",
    ]


def _broader(code: str) -> list[str]:
    """The code, then what is left of it without region and script."""
    parts = code.split("-")
    return ["-".join(parts[:count]) for count in range(len(parts), 0, -1)]


def _locale(code: str) -> Locale | None:
    for part in _broader(code):
        try:
            return Locale.parse(part, sep="-")
        except UnknownLocaleError:
            continue
    return None


def _spoken_point(language: str) -> str:
    """What stands between the words for 1 and 5 in 1.5, where it is a word of its own."""
    words = _words(language, 1.5).split()
    return words[1] if len(words) == 3 else ""


def _spoken_minus(language: str) -> str:
    words = _words(language, -3).split()
    return words[0] if len(words) == 2 else ""


def _words(language: str, number: float) -> str:
    try:
        return str(num2words(number, lang=language))
    except (NotImplementedError, ValueError):  # as Czech does for what is below zero
        return ""


def _quoted(text: str) -> str:
    return yaml.safe_dump(text, allow_unicode=True, default_style='"', width=10_000).strip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="tools/new_recipe.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("code", help="as in BCP 47: cy")
    parser.add_argument("name", nargs="?", help='what to call it: "Welsh"')
    arguments = parser.parse_args()

    def run() -> None:
        """Makes the recipe and says what comes next."""
        recipe = make_recipe(REPO, arguments.code, arguments.name).relative_to(REPO)
        print(f"made {recipe}. {recipe}/README.md says where your recordings go and what to check.")
        print(f"Then: {recipe}/run.sh --init ml")

    main(run)
