"""Write the worldqa corpus and its questions from the facts of `worldqa_facts`.

Every question is a chain of hops. Each hop is a fact in one passage. The subject of a hop is the answer
of the previous hop.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from a2tgpo.search.passage import Passage

from worlds.worldqa_facts import City, Country, Name

TEST_SHARE = 0.3
"""Share of the countries that are reserved for test questions, together with their cities."""

PHRASES = {
    "country": "the country in which {} lies",
    "neighbour": "the most populous neighbour of {}",
    "largest_city": "the largest city of {}",
    "capital": "the capital of {}",
    "currency": "the currency of {}",
    "language": "the official language of {}",
    "north": "the nearest town north of {}",
    "south": "the nearest town south of {}",
}
QUERIES = {
    "country": "country of {}",
    "neighbour": "most populous neighbour of {}",
    "largest_city": "largest city of {}",
    "capital": "capital of {}",
    "currency": "currency of {}",
    "language": "official language of {}",
    "north": "nearest town north of {}",
    "south": "nearest town south of {}",
}
CITY_RELATIONS = ("country", "north", "south")
CHAINS: dict[int, list[tuple[str, ...]]] = {
    1: [
        ("country",),
        ("north",),
        ("south",),
        ("capital",),
        ("currency",),
        ("language",),
        ("neighbour",),
        ("largest_city",),
    ],
    2: [
        ("country", "capital"),
        ("country", "currency"),
        ("country", "language"),
        ("country", "neighbour"),
        ("neighbour", "capital"),
        ("neighbour", "currency"),
        ("largest_city", "north"),
        ("largest_city", "south"),
    ],
    3: [
        ("country", "neighbour", "capital"),
        ("country", "neighbour", "currency"),
        ("country", "neighbour", "language"),
        ("country", "largest_city", "north"),
        ("country", "largest_city", "south"),
    ],
}
"""{number of hops: chains of relations}. A chain's first relation is a relation of the question's subject."""


@dataclass(frozen=True)
class Hop:
    """One fact of a chain: `answer` is the `relation` of `subject`. The passage `passage_id` states this fact."""

    relation: str
    subject: str
    answer: Name
    passage_id: str

    @property
    def query(self) -> str:
        return QUERIES[self.relation].format(self.subject)


@dataclass(frozen=True)
class Question:
    hops: tuple[Hop, ...]
    entities: tuple[str, ...]
    """Codes of all countries in the chain, including the country of the answer."""

    @property
    def id(self) -> str:
        relations = "-".join(hop.relation for hop in self.hops)
        return f"{relations}:{self.hops[0].subject}".lower().replace(" ", "_")

    @property
    def text(self) -> str:
        phrase = self.hops[0].subject
        for hop in self.hops:
            phrase = PHRASES[hop.relation].format(phrase)
        return f"What is {phrase}?"

    @property
    def answers(self) -> list[str]:
        return self.hops[-1].answer.answers

    def to_dict(self) -> dict:
        return {"id": self.id, "question": self.text, "answers": self.answers, "hops": len(self.hops)}


def rounded(number: int) -> str:
    """Return a rounded count in words: "67 million" for 66987244, "521 thousand" for 520774."""
    if number >= 10_000_000:
        return f"{round(number / 1e6)} million"
    if number >= 1_000_000:
        return f"{number / 1e6:.1f} million"
    return f"{max(1, round(number / 1e3))} thousand"


def build_corpus(world: dict[str, Country]) -> list[Passage]:
    """Return short passages: up to six for each country, and up to three for each city."""
    passages = []
    for country in world.values():
        passages += _country_passages(country, world)
        for city in country.cities:
            passages += _city_passages(city, country)
    return passages


def _country_passages(country: Country, world: dict[str, Country]) -> list[Passage]:
    name, code = country.name.text, country.code
    passages = []

    def add(kind: str, sentences: list[str]) -> None:
        if sentences:
            passages.append(Passage(f"{code}-{kind}", name, " ".join(sentences)))

    overview = [f"{name} lies in {country.subregion or country.continent}."]
    if country.area_km2:
        overview.append(f"Its area is {rounded(country.area_km2)} square kilometres.")
    if country.population:
        overview.append(f"About {rounded(country.population)} people live there.")
    add("overview", overview)
    cities = [f"The capital of {name} is {country.capital.text}."] if country.capital else []
    if country.largest_city:
        cities.append(f"The largest city of {name} is {country.largest_city.text}.")
    add("cities", cities)
    if country.currency:
        add("money", [f"The currency of {name} is the {country.currency.text}."])
    if country.language:
        add("language", [f"The official language of {name} is {country.language.text}."])
    if country.largest_neighbour:
        largest = world[country.largest_neighbour].name.text
        add("neighbour", [f"The most populous neighbour of {name} is {largest}."])
    if country.neighbours:
        names = [world[neighbour].name.text for neighbour in country.neighbours]
        listed = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
        add("borders", [f"{name} borders {listed}."])
    return passages


def _city_passages(city: City, country: Country) -> list[Passage]:
    name, identity = city.name.text, city_passage_id(city)
    passages = [Passage(identity, name, f"{name} is a city in {country.name.text}.")]
    for direction, town in (("north", city.north), ("south", city.south)):
        if town is not None:
            text = f"The nearest town {direction} of {name} is {town.text}."
            passages.append(Passage(f"{identity}-{direction}", name, text))
    return passages


def city_passage_id(city: City) -> str:
    return f"{city.country_code}-city-{city.name.text}".lower().replace(" ", "_")


def split_countries(world: dict[str, Country], seed: int) -> tuple[set[str], set[str]]:
    """Divide the countries into two disjoint sets. Return the codes for training and the codes for test."""
    codes = sorted(world)
    random.Random(f"split-{seed}").shuffle(codes)
    num_test = round(TEST_SHARE * len(codes))
    return set(codes[num_test:]), set(codes[:num_test])


def build_questions(
    world: dict[str, Country], codes: set[str], answerable: Callable[[Hop], bool]
) -> dict[int, list[Question]]:
    """Return {number of hops: questions} for countries in `codes`. `answerable` is true of all their hops."""
    questions: dict[int, list[Question]] = {}
    for num_hops, chains in CHAINS.items():
        found = []
        for code in sorted(codes):
            for chain in chains:
                country = world[code]
                subjects: Sequence[Country | City] = [country]
                if chain[0] in CITY_RELATIONS:
                    subjects = country.cities
                found += [question for subject in subjects if (question := _follow(world, subject, chain))]
        questions[num_hops] = [
            question
            for question in found
            if set(question.entities) <= codes and all(answerable(hop) for hop in question.hops)
        ]
    return questions


def _follow(world: dict[str, Country], subject: Country | City, chain: tuple[str, ...]) -> Question | None:
    """Return the question about the relations of `chain`, starting with `subject`.

    Return None if a fact is missing, or if the chain returns to an earlier entity.
    """
    hops, codes, seen = [], [], {subject.name.text}
    at: Country | City | None = subject
    for relation in chain:
        if at is None:
            return None
        step = _step(world, at, relation)
        if step is None or (step[0].text in seen and relation != "capital") or step[0].text == at.name.text:
            return None
        answer, passage_id, target = step
        codes.append(at.country_code if isinstance(at, City) else at.code)
        hops.append(Hop(relation, at.name.text, answer, passage_id))
        seen.add(answer.text)
        at = target
    if at is not None:
        codes.append(at.country_code if isinstance(at, City) else at.code)
    if len({hop.answer.text for hop in hops}) < len(hops):
        return None
    return Question(tuple(hops), tuple(dict.fromkeys(codes)))


def _step(
    world: dict[str, Country], at: Country | City, relation: str
) -> tuple[Name, str, Country | City | None] | None:
    """Return a hop's answer, the id of the passage that states the answer, and the answer's entity.

    The entity is None if no hop can start from the answer. If the fact is missing, return None instead of a tuple.
    """
    if isinstance(at, City):
        if relation == "country":
            return world[at.country_code].name, city_passage_id(at), world[at.country_code]
        town = getattr(at, relation, None)
        return (town, f"{city_passage_id(at)}-{relation}", None) if town else None
    country_fact = {"capital": "cities", "currency": "money", "language": "language"}
    if relation in country_fact:
        answer = getattr(at, relation)
        return (answer, f"{at.code}-{country_fact[relation]}", None) if answer else None
    if relation == "neighbour" and at.largest_neighbour:
        neighbour = world[at.largest_neighbour]
        return neighbour.name, f"{at.code}-neighbour", neighbour
    if relation == "largest_city" and at.largest_city:
        city = next(city for city in at.cities if city.name.text == at.largest_city.text)
        return city.name, f"{at.code}-cities", city
    return None
