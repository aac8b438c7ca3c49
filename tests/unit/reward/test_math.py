"""The reward `math`, with its helper processes."""

import subprocess
import sys
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
    math.take_counts()
    assert score(math, "9^{9^{9^9}}", "3") == 0.0
    assert score(math, "3", "3") == 1.0
    assert [math.take_counts() for _ in range(2)] == [{"timeouts": 1}, {"timeouts": 0}]


def printed_by_a_helper_that_waits(*, longest_s: int) -> str:
    """Return what a helper prints about an equal answer if its comparison sleeps for 2 s."""
    program = f"""
import time
from a2tgpo.lifecycle.helper_process import serve
are_equal = lambda answer, golds: answer == "1" or time.sleep(2) is None
serve(are_equal, example=("1", []), cpu_s=1, longest_s={longest_s})
"""
    command = [sys.executable, "-c", program]
    return subprocess.run(command, input='["2", ["2"]]\n', stdout=subprocess.PIPE, text=True).stdout


def test_only_cpu_time_counts_up_to_a_generous_limit():
    assert printed_by_a_helper_that_waits(longest_s=60) == "null\n[true, null]\n"
    assert printed_by_a_helper_that_waits(longest_s=1) == "null\n"
