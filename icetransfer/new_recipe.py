"""Makes a recipe for a new language: a copy of egs/TEMPLATE, and text rules from the CLDR.

    tools/new_recipe.sh CODE [NAME]
    tools/new_recipe.sh cy "Welsh"
    tools/new_recipe.sh sr-Latn

CODE is the language's code as in BCP 47 (cy, tr, sr-Latn); NAME is how people call it, by default
its English name. Nothing that exists is overwritten. The text rules, `egs/<code>/local/text.yaml`,
begin as what the Unicode CLDR knows of the language: its alphabet, the words of its numbers, units,
currencies and months. A native speaker should read them, and what `egs/<code>/README.md` lists,
before results are believed. Scripts without spaces between words get characters as tokens, and are
scored by CER.
"""

import difflib
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import yaml
from babel import Locale, UnknownLocaleError
from babel.core import get_global
from babel.numbers import get_decimal_symbol, get_group_symbol

from icetransfer.data.text.normalizer import LANGUAGE_FOLDER
from icetransfer.data.text.spelling import cldr_rules, spelled
from icetransfer.experiment import main
from icetransfer.stage.command import command_parser

REPO = Path(__file__).parents[1]
ALPHABETS = Path(__file__).parent / "data/text/alphabets.yaml"

# Languages that write a small i with and without a dot: Unicode's own lower case mixes them.
_DOTTED_I = {"az", "tr", "tt", "crh", "gag", "kk-Latn"}
# Scripts (ISO 15924) that put no space between words, and letters of those that have thousands.
_HAN = ["一-鿿", "㐀-䶿", "〇"]
_SPACELESS: Mapping[str, list[str]] = {
    "Hans": _HAN, "Hant": _HAN, "Hani": _HAN,
    "Jpan": [*_HAN, "々", "ぁ-ゖ", "ゝ-ゞ", "ァ-ヺ", "ー-ヾ"],
    "Thai": [], "Laoo": [], "Khmr": [], "Mymr": [], "Tibt": [],
}  # fmt: skip
_VOWEL_SIGNS_LEFT_OUT = {"Arab", "Hebr"}
# The CLDR's spell-out rules that a form of our own names.
_FORMS = {"m": "cardinal-masculine", "f": "cardinal-feminine", "n": "cardinal-neuter"}


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
        if _script(code) in _SPACELESS:
            config = new / "conf/default.yaml"
            text = config.read_text(encoding="utf-8")
            config.write_text(
                re.sub(r"  vocab_size: .*", "  tokens: characters", text), encoding="utf-8"
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
    raise ValueError(f"{language} is not a language that the CLDR knows; {hint}")


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
    script = _script(code)
    ranges = _SPACELESS.get(script, [])
    lines = [
        f"# Text rules of {name}, for icetransfer/data/text/normalizer.py; docs/text.md explains.",
        "# A native speaker should check them.",
        f"name: {_quoted(name)}",
    ]
    if letters or ranges:
        lines += ["# The CLDR's. Training sentences with other letters are dropped and counted."]
    else:
        lines += [
            "# The CLDR knows no alphabet of this language: write all its small letters here."
        ]
    lines += [f"alphabet: {_quoted(letters)}"]
    if ranges:
        lines += [f"ranges: [{', '.join(ranges)}]"]
    if script in _SPACELESS:
        lines += ["spaces: remove  # none between words: tokens are characters, CER is the measure"]
    if code in _DOTTED_I or code.partition("-")[0] in _DOTTED_I:
        lines += ["lower: {I: ı, İ: i}"]
    if script in _VOWEL_SIGNS_LEFT_OUT:
        lines += ["vowel_signs: remove  # most text has none"]
    catalan = code.partition("-")[0] == "ca"
    if catalan:
        lines += ['inside: "·"  # col·legi']
    lines += [
        "apostrophe: keep  # inside words: keep, or remove",
        f"hyphen: {'keep' if catalan else 'space'}  # inside words: keep, or a space",
        "abbreviations: {}  # as written: as read, such as {e.g.: for example}",
        "events: []  # what brackets hold that is not said, as in [laughter], beside English words",
        *_number_rules(code),
    ]
    return "\n".join(lines) + "\n"


def _number_rules(code: str) -> list[str]:
    """How numbers are read out, as far as the CLDR knows it."""
    # A region mostly has no words of its own: ca-AD has those of ca.
    locales = [found for part in _broader(code) if (found := _locale(part)) is not None]
    locale = next((found for found in locales if cldr_rules(str(found))), None)
    rules = cldr_rules(str(locale)) if locale else []
    cardinal = next((r for r in ("numbering", "cardinal", "cardinal-masculine") if r in rules), "")
    if locale is None or not cardinal:
        return [
            "# The CLDR does not know the words of this language's numbers. Digits and symbols",
            "# stay, and training sentences with them are dropped, until `numbers` says how they",
            "# are read out: icetransfer/data/text/numerals.py explains.",
        ]
    forms = {form: rule for form, rule in _FORMS.items() if rule in rules}
    cldr = {"cardinal": cardinal, **forms}
    group = get_group_symbol(locale).replace("\u202f", " ").replace("\u00a0", " ")
    spelled_out = ", ".join(f"{key}: {rule}" for key, rule in cldr.items())
    return [
        "# The CLDR's words of numbers, units, currencies and months. How years, dates, ordinals",
        "# are read is for you to add: icetransfer/data/text/numerals.py explains.",
        "numbers:",
        f"  locale: {locale}",
        f"  cldr: {{{spelled_out}}}",
        f"  decimal: {_quoted(get_decimal_symbol(locale))}",
        f"  thousands: {_quoted(group)}",
        f"  point: {_quoted(_spoken_point(str(locale), cardinal))}",
        "  fraction: digits",
        f"  minus: {_quoted(_spoken_minus(str(locale), cardinal))}",
        "  symbols: {}  # such as {+: plus, &: and}",
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


def _script(code: str) -> str:
    """The script that a language is written in, by ISO 15924; "" for one the CLDR does not know."""
    parts = code.split("-")
    if len(parts) > 1 and len(parts[1]) == 4:
        return parts[1]
    likely = get_global("likely_subtags")
    found: str = likely.get("_".join(parts)) or likely.get(parts[0]) or ""
    return next((part for part in found.split("_") if len(part) == 4), "")


def _spoken_point(locale: str, rule: str) -> str:
    """What stands between the words for 1 and 5 in 1.5."""
    whole, fraction = spelled(1, locale, rule), spelled(5, locale, rule)
    return spelled(1.5, locale, rule).removeprefix(whole).removesuffix(fraction).strip()


def _spoken_minus(locale: str, rule: str) -> str:
    return spelled(-3, locale, rule).removesuffix(spelled(3, locale, rule)).strip()


def _quoted(text: str) -> str:
    return yaml.safe_dump(text, allow_unicode=True, default_style='"', width=10_000).strip()


if __name__ == "__main__":
    parser = command_parser(__doc__, "docs/text.md, docs/corpora.md")
    parser.prog = "tools/new_recipe.sh"
    parser.add_argument("code", help="as in BCP 47: cy")
    parser.add_argument("name", nargs="?", help='what to call it: "Welsh"')
    arguments = parser.parse_args()

    def run() -> None:
        """Makes the recipe and says what comes next."""
        recipe = make_recipe(REPO, arguments.code, arguments.name).relative_to(REPO)
        print(f"made {recipe}. {recipe}/README.md says where your recordings go and what to check.")
        print(f"Then: {recipe}/run.sh --init ml")

    main(run)
