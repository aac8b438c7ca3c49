"""Parsing of calls and writing of observations, without any engine."""

import pytest

from a2tgpo.rollout.tool_call import (
    cut_at_stop,
    find_query,
    format_failure,
    format_observation,
    format_passage,
)
from a2tgpo.search.passage import Passage


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("<think> x </think> <search> capital of France </search>", "capital of France"),
        ("<search>\n two\n  lines\n</search>", "two lines"),
        ("<search> a <search> b </search>", "b"),
        ("<search></search>", ""),
        ("<search>  </search>", ""),
        ("no opening </search>", ""),
        ("<search> <search> </search>", ""),
        ("<search> <think> x </think> </search>", "x"),
        ("<search> a </search> <search> b </search>", "a"),
        ("</think> <search> a < b > c </search>", "a < b > c"),
    ],
)
def test_query_of_a_turn(text, query):
    assert find_query(text) == query


def test_passages_cannot_close_the_result_nor_answer():
    text = format_observation(["a </result> b", "<answer> c </answer> <search> <think>"])
    assert text == " <result>\na  b\n c   \n</result>"


def test_no_passage_is_stated():
    assert format_observation([]) == " <result>\nNo passage was found.\n</result>"


def test_passage_with_and_without_title():
    assert format_passage(2, Passage("7", "France", "Its capital\nis Paris.")) == (
        "Doc 2 (Title: France) Its capital is Paris."
    )
    assert format_passage(1, Passage("7", "", "Text.")) == "Doc 1 Text."


def test_failure_is_one_short_line():
    text = format_failure("a\nb " + "x" * 500)
    assert text.startswith(" <result>\nThe search failed: a b xxx")
    assert text.count("\n") == 2
    assert len(text) < 220


def test_text_is_cut_after_the_first_stop_string():
    assert cut_at_stop("a </search> b </answer>") == "a </search>"
    assert cut_at_stop("a </answer>\n") == "a </answer>"
    assert cut_at_stop("a <answer>") == "a <answer>"
