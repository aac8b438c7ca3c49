import math

from hypothesis import given
from hypothesis import strategies as st

from a2tgpo.reward.info_gain import answer_logprob, info_gains, mean_logprob

logprobs = st.floats(-30, 0)


@given(st.lists(logprobs, min_size=1, max_size=7))
def test_gains_of_all_turns_sum_to_the_whole_rise(contexts):
    for measure, value in (("probability", math.exp), ("log_probability", float)):
        gains = info_gains(contexts, measure=measure)
        assert len(gains) == len(contexts) - 1
        assert math.isclose(sum(gains), value(contexts[-1]) - value(contexts[0]), abs_tol=1e-9)


@given(st.lists(logprobs, min_size=3, max_size=7), st.data())
def test_a_missing_score_silences_its_two_neighbours_and_no_other_turn(contexts, data):
    missing = data.draw(st.integers(0, len(contexts) - 1))
    whole = info_gains(contexts)
    gains = info_gains([None if i == missing else p for i, p in enumerate(contexts)])
    for turn, gain in enumerate(gains):
        assert gain == (None if missing in (turn, turn + 1) else whole[turn])


def test_only_finite_scores_count():
    assert mean_logprob([]) is None
    assert mean_logprob([-1.0, float("-inf")]) is None
    assert mean_logprob([float("nan")]) is None
    assert mean_logprob([-1.0, -3.0]) == -2.0


def test_best_alias_is_taken_only_when_all_could_be_scored():
    assert answer_logprob([[-4.0], [-1.0, -2.0]]) == -1.5
    assert answer_logprob([[-4.0], [float("nan")]]) is None
    assert answer_logprob([]) is None
