"""The reward `math`, with its helper processes."""

from types import SimpleNamespace

import pytest

from a2tgpo.reward.methods.math import MathEquality


@pytest.fixture(scope="module")
def math():
    reward = MathEquality()
    yield reward
    reward.close()


def score(math, answer, *golds) -> float:
    return math.score(SimpleNamespace(answer=answer, answers=golds))


@pytest.mark.parametrize(
    ("answer", "golds", "expected"),
    [
        ("\\frac{1}{2}", ["0.5"], 1.0),
        ("(x+1)^2", ["x^2+2x+1"], 1.0),
        ("$12$", ["13", "12"], 1.0),
        ("3", ["4"], 0.0),
        ("\\frac{", ["4"], 0.0),
        ("a\nb", ["4"], 0.0),
        (None, ["4"], 0.0),
    ],
)
def test_expressions_are_compared_by_value(math, answer, golds, expected):
    assert score(math, answer, *golds) == expected


def test_an_answer_that_takes_for_ever_is_wrong_and_blocks_no_other(math):
    assert score(math, "9^{9^{9^9}}", "3") == 0.0
    assert score(math, "3", "3") == 1.0
