"""Tables of an evaluation, compared with numbers counted by hand."""

import dataclasses
import itertools

import pytest

from a2tgpo.evaluate.evaluate import Answer, pass_at_k
from a2tgpo.evaluate.report import summarize, to_markdown, to_scalars


def answer(question, *, em=1.0, f1=None, ok=True, calls=1, sample=0, hops=0):
    return Answer(
        question_id=question,
        question="q?",
        golds=("a",),
        hops=hops,
        sample_index=sample,
        answer="a",
        exact_match=em,
        f1=em if f1 is None else f1,
        format_ok=ok,
        tool_calls=calls,
        stop_reason="answer",
    )


@pytest.mark.parametrize("num_samples", [1, 3, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(num_samples):
    for num_right in range(num_samples + 1):
        right = [i < num_right for i in range(num_samples)]
        for k in range(1, num_samples + 1):
            subsets = list(itertools.combinations(right, k))
            expected = sum(any(subset) for subset in subsets) / len(subsets)
            assert pass_at_k(num_samples, num_right, k) == pytest.approx(expected, abs=1e-12)


def test_the_average_counts_every_question_the_same_and_the_gate_takes_away():
    greedy = {
        "big": [answer("1"), answer("2", em=0.0, f1=0.5, calls=2), answer("3", ok=False, calls=2)],
        "small": [answer("1", em=0.0, f1=0.0)],
    }
    summary = summarize(greedy, {})
    big = summary["sets"]["big"]
    assert (big["em"], big["em_format_gated"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert (big["f1"], big["f1_format_gated"]) == (pytest.approx(2.5 / 3), pytest.approx(1.5 / 3))
    assert summary["average"]["em"] == 0.5 and summary["average"]["num_questions"] == 4
    assert {n: s["num_questions"] for n, s in big["by_tool_calls"].items()} == {1: 1, 2: 2}
    assert big["by_tool_calls"][2]["em"] == 0.5
    assert "pass_at" not in big


def test_samples_give_pass_at_powers_of_two_by_set_and_over_all():
    samples = [answer("1", em=float(i == 0), sample=i) for i in range(4)]
    samples += [answer("2", em=1.0, ok=False, sample=i) for i in range(4)]
    other = [answer("1", em=0.0, sample=i) for i in range(4)]
    summary = summarize({"a": [answer("1"), answer("2")], "b": [answer("1")]}, {"a": samples, "b": other})
    assert summary["sets"]["a"]["pass_at"]["exact_match"] == {1: 0.625, 2: 0.75, 4: 1.0}
    assert summary["sets"]["a"]["pass_at"]["format_gated"] == {1: 0.125, 2: 0.25, 4: 0.5}
    assert summary["average"]["pass_at"]["exact_match"][4] == pytest.approx(2 / 3)
    scalars = to_scalars(summary)
    assert scalars["a/pass_at_2_exact_match"] == 0.75 and scalars["average/em"] == 1.0


def test_the_page_has_a_row_per_set_and_breakdown():
    page = to_markdown(summarize({"a|b": [answer("1", hops=2)]}, {}), title="T", notes=["n"])
    assert "| a\\|b | 1 | 1.000 |" in page and "| average | 1 | 1.000 |" in page
    assert "By number of tool calls" in page and "By number of hops" in page and "pass@" not in page


def test_rewards_are_averaged_over_the_answers_that_they_judged():
    judged = [dataclasses.replace(answer(str(n)), scores={"judge": float(n)}) for n in range(3)]
    summary = summarize({"mine": [*judged, answer("3")], "other": [answer("0")]}, {})
    assert summary["sets"]["mine"]["rewards"] == {"judge": 1.0}
    assert to_scalars(summary)["mine/judge"] == 1.0 and "other/judge" not in to_scalars(summary)
    page = to_markdown(summary, title="t", notes=[])
    assert "## Rewards" in page and "| mine | 1.000 |" in page and "| other | - |" in page
    assert "## Rewards" not in to_markdown(summarize({"a": [answer("0")]}, {}), title="t", notes=[])
