"""The questions of a large set that an evaluation during training uses."""

from collections import Counter
from pathlib import Path

import pytest

from a2tgpo.data.question_set import Question, load_questions
from a2tgpo.data.stratified_subset import stratified_subset


def questions(*strata):
    """Return questions from (source, hops, number of questions), one after the other."""
    labels = [(source, hops) for source, hops, number in strata for _ in range(number)]
    return [
        Question(id=str(index), question="who?", answers=("a",), source=source, hops=hops)
        for index, (source, hops) in enumerate(labels)
    ]


def labels(chosen):
    return Counter((question.source, question.hops) for question in chosen)


def test_sets_behind_each_other_in_one_file_all_have_their_share():
    joined = questions(("nq", 0, 3610), ("hotpotqa", 2, 7405), ("bamboogle", 2, 125), ("musique", 3, 2417))
    chosen = stratified_subset(joined, 256)
    assert labels(chosen) == {("nq", 0): 68, ("hotpotqa", 2): 140, ("bamboogle", 2): 2, ("musique", 3): 46}
    assert chosen == sorted(chosen, key=lambda question: int(question.id))
    assert chosen == stratified_subset(joined, 256)


@pytest.mark.parametrize("count", range(8))
def test_shares_add_up_whatever_is_left_over(count):
    chosen = stratified_subset(questions(("a", 1, 3), ("b", 1, 3), ("", 0, 1)), count)
    assert len(chosen) == len(set(chosen)) == count


def test_questions_without_source_and_hops_are_spread_over_the_file():
    chosen = stratified_subset(questions(("", 0, 1000)), 4)
    assert [question.id for question in chosen] == ["0", "250", "500", "750"]


def test_a_file_in_proportion_keeps_its_first_questions():
    mixed = questions(*[("", hops, 1) for _ in range(20) for hops in (1, 2, 3)])
    assert stratified_subset(mixed, 24) == mixed[:24]


def test_a_subset_as_large_as_the_set_is_the_set():
    members = questions(("b", 1, 2), ("a", 0, 2), ("b", 1, 1))
    assert stratified_subset(members, 5) == stratified_subset(members, 9) == members


def test_the_source_of_a_record_is_read(tmp_path: Path):
    file = tmp_path / "q.jsonl"
    file.write_text(
        '{"question": "who?", "answers": ["a"], "data_source": "nq"}\n{"question": "?", "answers": ["b"]}\n'
    )
    assert [question.source for question in load_questions(str(file))] == ["nq", ""]
