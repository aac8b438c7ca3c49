"""The chains data set: what its questions ask, and what its demonstrations do."""

import json
import re
from collections import Counter

import pytest
from prepare_data import prepare

from a2tgpo.io.errors import ConfigError

SIGNS = {"add": "+", "take away": "-", "multiply by": "*"}


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    out = tmp_path_factory.mktemp("chains")
    sizes = ["--train-questions", "120", "--test-questions", "30", "--demonstrations", "600"]
    prepare(["chains", "--out", str(out), *sizes])
    names = ("train", "test", "demonstrations")
    return {name: [json.loads(line) for line in (out / f"{name}.jsonl").open()] for name in names}


def value_of(text: str) -> int:
    """Compute the question `text` by Python's own parser."""
    expression = re.fullmatch(r"Start with (\d+)((?:, [a-z ]+ \d+)+)\.", text)
    written = expression[1]
    for words, number in re.findall(r", ([a-z ]+) (\d+)", expression[2]):
        written = f"({written}) {SIGNS[words]} {number}"
    return eval(written)


def test_answers_are_the_values_of_the_chains(chains):
    for record in chains["train"] + chains["test"]:
        assert record["answers"] == [str(value_of(record["question"]))]
        assert record["hops"] == record["question"].count(",")


def test_questions_of_one_to_six_steps_are_equally_many_and_in_one_file(chains):
    assert Counter(r["hops"] for r in chains["train"]) == dict.fromkeys(range(1, 7), 20)
    assert not {r["question"] for r in chains["train"]} & {r["question"] for r in chains["test"]}


def test_good_demonstrations_reach_the_answer_and_others_do_not(chains):
    for record in chains["demonstrations"]:
        *calls, last = record["turns"]
        results = [re.search(r"<result>\n(-?\d+)\n</result>", turn["observation"])[1] for turn in calls]
        for turn, result in zip(calls, results, strict=True):
            assert str(eval(re.search(r"<calculator> (.*) </calculator>", turn["text"])[1])) == result
        assert len(calls) <= 8
        if record["quality"] == "good":
            assert (
                f"\\boxed{{{record['answers'][0]}}}" in last["text"] and results[-1] == record["answers"][0]
            )
        if record["quality"] in ("early_stop", "guess"):
            assert len(set(map(str, calls))) < record["hops"]
    assert len({record["quality"] for record in chains["demonstrations"]}) == 5


def test_equal_seeds_give_equal_files(tmp_path):
    sizes = ["--train-questions", "9", "--test-questions", "3", "--demonstrations", "12"]
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        prepare(["chains", "--out", str(tmp_path / name), "--seed", seed, *sizes])
    a, b, c = ((tmp_path / name / "demonstrations.jsonl").read_text() for name in "abc")
    assert a == b != c


def test_more_chains_than_allowed_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--train-questions .* allowed: at most 60000"):
        prepare(["chains", "--out", str(tmp_path / "a"), "--train-questions", "60001"])
