"""The files of the worldqa data set have the promised properties."""

import json
from pathlib import Path

import pytest
from prepare_data import prepare
from scored import score_response

from a2tgpo.data.demonstrations import load_demonstrations
from a2tgpo.data.question_set import load_questions
from a2tgpo.io.errors import ConfigError
from a2tgpo.protocol.tag_format import judged_text
from a2tgpo.protocol.tag_syntax import SEARCH_CALLS
from a2tgpo.search.bm25 import Bm25Index
from a2tgpo.search.corpus import load_corpus
from a2tgpo.search.passage import format_passage
from tests.unit.tools.conftest import SMALL

from worlds.worldqa_facts import ascii_fold, load_world, nearest_town
from worlds.worldqa_questions import rounded

FILES = ("corpus.jsonl", "train.jsonl", "test.jsonl", "demonstrations.jsonl", "demonstrations_good.jsonl")


@pytest.fixture(scope="module")
def index(worldqa: Path) -> Bm25Index:
    return Bm25Index(load_corpus(str(worldqa / "corpus.jsonl")))


@pytest.fixture(scope="module")
def good(worldqa: Path):
    return load_demonstrations(str(worldqa / "demonstrations_good.jsonl"))


def subject_of(identity: str) -> str:
    """ "country-capital:lyon" -> "lyon"."""
    return identity.partition(":")[2]


def test_equal_seeds_give_equal_files_and_another_seed_another_split(worldqa: Path, tmp_path: Path):
    prepare(["worldqa", "--out", str(tmp_path / "same"), *SMALL])
    prepare(["worldqa", "--out", str(tmp_path / "other"), "--seed", "1", *SMALL])
    for name in FILES:
        made = (worldqa / name).read_bytes()
        assert made == (tmp_path / "same" / name).read_bytes()
        assert (made == (tmp_path / "other" / name).read_bytes()) == (name == "corpus.jsonl")


def test_nothing_asked_in_test_is_asked_or_demonstrated_in_training(worldqa: Path, good):
    train, test = (load_questions(str(worldqa / f"{name}.jsonl")) for name in ("train", "test"))
    shown = [*good, *load_demonstrations(str(worldqa / "demonstrations.jsonl"))]
    trained = {subject_of(question.id) for question in train}
    trained |= {subject_of(demonstration.question.id) for demonstration in shown}
    assert not trained & {subject_of(question.id) for question in test}
    assert not {question.question for question in train} & {question.question for question in test}
    # Demonstrated searches do not ask about a test question's subject either, not even between question and answer.
    queries = {
        SEARCH_CALLS.find_query(text, "search") for demonstration in shown for text, _ in demonstration.turns
    }
    asked = {query.partition(" of ")[2].lower().replace(" ", "_") for query in queries}
    assert not (asked - {"it"}) & {subject_of(question.id) for question in test}


def test_report_finds_no_country_in_both_splits_and_nothing_twice(worldqa: Path):
    report = json.loads((worldqa / "report.json").read_text())
    assert report["countries_in_both"] == 0
    assert report["repeated_questions"] == 0
    assert report["repeated_passages"] == 0
    assert report["passages"] > 3000


def test_every_number_of_hops_is_asked_about_equally_often(worldqa: Path):
    for name in ("train", "test"):
        hops = [question.hops for question in load_questions(str(worldqa / f"{name}.jsonl"))]
        assert set(hops) == {1, 2, 3}
        assert all(0.25 < hops.count(number) / len(hops) < 0.42 for number in (1, 2, 3))
        first = hops[: len(hops) // 3]
        assert all(0.2 < first.count(number) / len(first) < 0.45 for number in (1, 2, 3))


def test_every_demonstrated_hop_is_answered_by_the_first_hit_of_its_query(good, index: Bm25Index):
    for demonstration in good:
        *searches, (last, nothing) = demonstration.turns
        assert nothing is None
        assert len(searches) == demonstration.question.hops
        for text, observation in searches:
            hits = [passage for passage, _ in index.search(SEARCH_CALLS.find_query(text, "search"), 1)]
            assert observation == SEARCH_CALLS.format_result([format_passage(1, hits[0])])
        # Each later query, and the answer, contains a name from the previous result.
        found = [observation for _, observation in searches]
        wanted = [SEARCH_CALLS.find_query(text, "search").partition(" of ")[2] for text, _ in searches[1:]]
        wanted.append(demonstration.question.answers[0])
        assert all(name in result for name, result in zip(wanted, found, strict=True))
        assert demonstration.question.answers[0] in last


def test_good_demonstrations_earn_full_reward_and_poor_ones_none(worldqa: Path, good):
    mixed = load_demonstrations(str(worldqa / "demonstrations.jsonl"))
    assert {demonstration.quality for demonstration in mixed} == {
        "good", "guess", "early_stop", "miscopy", "useless_query", "malformed",
    }  # fmt: skip
    for demonstration in [*good, *mixed]:
        response = judged_text([(text, observation is not None) for text, observation in demonstration.turns])
        score = score_response(response, demonstration.question.answers)
        expected = {"good": 1.0, "malformed": -1.0}.get(demonstration.quality, 0.0)
        assert score.reward == expected, response


def test_most_demonstrations_of_several_hops_are_poor(worldqa: Path):
    mixed = load_demonstrations(str(worldqa / "demonstrations.jsonl"))
    for hops, share in ((1, 0.6), (2, 0.26), (3, 0.2)):
        qualities = [d.quality for d in mixed if d.question.hops == hops]
        assert qualities.count("good") / len(qualities) == pytest.approx(share, abs=0.01)


def test_detours_lengthen_demonstrations_but_change_neither_quality_nor_worth(tmp_path: Path):
    prepare(["worldqa", "--out", str(tmp_path), "--detour-share", "0.5", *SMALL])
    mixed = load_demonstrations(str(tmp_path / "demonstrations.jsonl"))
    searches = [len(d.turns) - 1 for d in mixed if d.quality == "good"]
    assert max(searches) == 6 and min(searches) == 1
    needless = sum(len(d.turns) - 1 - d.question.hops for d in mixed if d.quality == "good")
    assert needless / sum(searches) > 0.25
    for demonstration in mixed:
        response = judged_text([(text, observation is not None) for text, observation in demonstration.turns])
        score = score_response(response, demonstration.question.answers)
        assert score.reward == {"good": 1.0, "malformed": -1.0}.get(demonstration.quality, 0.0)
    good = load_demonstrations(str(tmp_path / "demonstrations_good.jsonl"))
    assert all(len(d.turns) - 1 == d.question.hops for d in good)


def test_answers_are_plain_and_keep_other_spellings_as_aliases(worldqa: Path):
    questions = [*load_questions(str(worldqa / "train.jsonl")), *load_questions(str(worldqa / "test.jsonl"))]
    assert all(answer == answer.strip() for question in questions for answer in question.answers)
    assert all(question.answers[0].isascii() for question in questions)
    assert any(not alias.isascii() for question in questions for alias in question.answers[1:])
    assert all(len(set(question.answers)) == len(question.answers) for question in questions)


def test_facts_on_which_the_sources_differ_are_left_out():
    world = load_world()
    assert world["FR"].capital is not None and world["FR"].capital.text == "Paris"
    assert world["BR"].capital is not None and world["BR"].capital.aliases == ("Brasília",)
    assert world["BI"].capital is None  # Gitega or Bujumbura
    assert world["HR"].currency is None  # Euro or Kuna
    assert world["CH"].language is None  # four of them
    assert world["ES"].largest_neighbour == "FR"


def test_nearest_town_looks_within_45_degrees_of_its_direction():
    import numpy as np

    at = {"latitude": 0.0, "longitude": 0.0}
    towns = [
        {"latitude": y, "longitude": x}
        for y, x in ((0.0, 0.0), (1.0, 2.0), (3.0, 1.0), (2.0, 2.0), (-1.0, 0.0))
    ]
    places = np.array([(town["latitude"], town["longitude"]) for town in towns])
    assert nearest_town(at, towns, places, northward=True) is towns[3]
    assert nearest_town(at, towns, places, northward=False) is towns[4]
    assert nearest_town(at, towns[:2], places[:2], northward=True) is None


@pytest.mark.parametrize(
    ("number", "said"), [(66_987_244, "67 million"), (1_260_000, "1.3 million"), (520_774, "521 thousand")]
)
def test_counts_are_said_in_round_numbers(number: int, said: str):
    assert rounded(number) == said


def test_folding_keeps_letters_and_drops_accents():
    assert ascii_fold("São Tomé") == "Sao Tome"
    assert ascii_fold("Łódź") == "Lodz"


def test_a_detour_before_every_search_is_refused_in_one_line(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"^--detour-share is 1.0; allowed: in \[0, 1\)$"):
        prepare(["worldqa", "--out", str(tmp_path), "--detour-share", "1"])


def test_too_few_questions_are_refused_in_one_line(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"^--test-questions is 0; allowed: >= 3$"):
        prepare(["worldqa", "--out", str(tmp_path), "--test-questions", "0"])


def test_few_questions_are_demonstrated_or_refused_in_one_line(tmp_path: Path):
    """Even if no other question has an answer of the same type, a wrong answer is found."""
    sizes = ["--test-questions", "60", "--demonstrations", "90"]
    prepare(["worldqa", "--out", str(tmp_path / "few"), "--train-questions", "30", *sizes])
    shown = load_demonstrations(str(tmp_path / "few" / "demonstrations.jsonl"))
    assert len(shown) >= 60 and {d.quality for d in shown} >= {"good", "guess", "early_stop"}
    with pytest.raises(ConfigError, match=r"^--train-questions is 3, too few for every number of hops"):
        prepare(["worldqa", "--out", str(tmp_path / "none"), "--train-questions", "3", *sizes])
    assert not (tmp_path / "none").exists()
