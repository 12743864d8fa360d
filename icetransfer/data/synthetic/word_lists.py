"""Lists of words and names in many languages, from Babel's CLDR, Faker and emoji."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from babel import Locale


def _cldr(attribute: str) -> Callable[[str, str], Iterable[str]]:
    """Returns a list of one of Babel's tables of names."""

    def entries(locale: str, faker_locale: str) -> Iterable[str]:
        table = getattr(Locale.parse(locale), attribute)
        return [re.sub(r"^\W+", "", name) for key, name in table.items() if not str(key).isdigit()]

    return entries


def _calendar(attribute: str) -> Callable[[str, str], Iterable[str]]:
    """Returns the CLDR's months or days as they stand in a date."""

    def entries(locale: str, faker_locale: str) -> Iterable[str]:
        names: Iterable[str] = getattr(Locale.parse(locale), attribute)["format"]["wide"].values()
        return names

    return entries


def _time_zone_city(locale: str, faker_locale: str) -> Iterable[str]:
    """Returns the cities for which time zones are named."""
    zones = Locale.parse(locale).time_zones.values()
    return [zone["city"] for zone in zones if "city" in zone]


@cache
def _faker_providers(faker_locale: str) -> dict[str, Any]:
    """Returns Faker's providers by name."""
    from faker import Faker

    return {type(p).__module__.split(".")[2]: p for p in Faker(faker_locale).get_providers()}


def _faker(*places: str) -> Callable[[str, str], Iterable[str]]:
    """Returns the first of Faker's lists that is there, named "provider.attribute"."""

    def entries(locale: str, faker_locale: str) -> Iterable[str]:
        providers = _faker_providers(faker_locale)
        for place in places:
            provider, attribute = place.split(".")
            # A provider without the locale falls back to another language's list.
            if type(providers[provider]).__module__.endswith(faker_locale):
                found: Any = getattr(providers[provider], attribute, None)
                if found:
                    return [e if isinstance(e, str) else e[-1] for e in found]
        return []

    return entries


def _emoji(locale: str, faker_locale: str) -> Iterable[str]:
    """Returns the names of the emoji, without flags and skin tones; not every language has them."""
    import emoji

    language = locale.split("_")[0]
    if language not in emoji.LANGUAGES:
        return []
    emoji.config.load_language(language)
    plain = [data for sign, data in emoji.EMOJI_DATA.items() if not _SKIN_OR_FLAG.search(sign)]
    return [re.sub(r"[_\s]+", " ", data.get(language, "").strip(":")) for data in plain]


_SKIN_OR_FLAG = re.compile("[\U0001f3fb-\U0001f3ff\U0001f1e6-\U0001f1ff]")


#: Name in a grammar -> function of Babel's and Faker's locale that returns the entries.
LISTS: dict[str, Callable[[str, str], Iterable[str]]] = {
    "territory": _cldr("territories"),
    "language": _cldr("languages"),
    "script": _cldr("scripts"),
    "currency": _cldr("currencies"),
    "month": _calendar("months"),
    "weekday": _calendar("days"),
    "city": _time_zone_city,
    "town": _faker("address.cities", "address.bairros", "address.states", "address.estados"),
    "word": _faker("lorem.word_list"),
    "job": _faker("job.jobs"),
    "color": _faker("color.all_colors"),
    "first_name": _faker("person.first_names"),
    "surname": _faker("person.last_names"),
    "emoji": _emoji,
}
