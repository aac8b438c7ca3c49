from a2tgpo.record.rollout_summary import RolloutSummary, best_and_worst, gains_by_turn

SUMMARIES = [
    RolloutSummary(0, 0, 0.0, (0.5, None)),
    RolloutSummary(0, 1, 1.0, (0.1,)),
    RolloutSummary(1, 0, -1.0, ()),
    RolloutSummary(1, 1, 1.0, (0.3,)),
]
NAMES = dict(zip(SUMMARIES, "abcd", strict=True))


def names(count):
    return {name: NAMES[chosen] for name, chosen in best_and_worst(SUMMARIES, count).items()}


def test_half_are_the_best_half_the_worst_and_none_is_shown_twice():
    assert names(0) == {}
    assert names(1) == {"best_0": "d"}
    assert names(2) == {"best_0": "d", "worst_0": "c"}
    assert names(8) == {"best_0": "d", "best_1": "b", "best_2": "a", "best_3": "c"}
    assert names(5) == {"best_0": "d", "best_1": "b", "best_2": "a", "worst_0": "c"}
    assert best_and_worst([], 4) == {}


def test_gains_stand_at_the_turn_they_belong_to_also_behind_one_that_is_missing():
    summaries = [RolloutSummary(0, 0, 0.0, (None, 0.5)), RolloutSummary(0, 1, 0.0, (0.1, 0.2))]
    assert gains_by_turn(summaries) == {1: [0.1], 2: [0.5, 0.2]}
