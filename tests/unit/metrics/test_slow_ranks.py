from a2tgpo.metrics.slow_ranks import SlowRanks


def times(*rollout: float) -> list[dict[str, float]]:
    return [{"time/rollout_s": seconds, "time/update_s": 5.0} for seconds in rollout]


def test_the_spread_of_a_stage_names_its_slowest_rank():
    spread, line = SlowRanks(ratio=1.5, steps=3).compare(times(1.0, 4.0, 2.0))
    assert line == ""
    assert spread["time/rollout_min_s"] == 1.0 and spread["time/rollout_max_s"] == 4.0
    assert spread["time/rollout_slowest_rank"] == 1.0 and spread["time/update_max_s"] == 5.0


def test_a_rank_that_stays_slow_is_named_once():
    ranks = SlowRanks(ratio=1.5, steps=3)
    lines = [ranks.compare(times(1.0, 1.0, 1.0, 2.0))[1] for _ in range(6)]
    assert [bool(line) for line in lines] == [False, False, True, False, False, False]
    assert "rank 3 is slow" in lines[2]


def test_ranks_that_take_turns_are_not_slow():
    ranks = SlowRanks(ratio=1.5, steps=2)
    assert not any(
        ranks.compare(times(*t))[1] for t in [(1, 9, 1), (9, 1, 1), (1, 1, 9), (1, 1, 1), (9, 1, 1)]
    )


def test_a_rank_alone_has_nobody_to_wait_for():
    assert SlowRanks(ratio=1.5, steps=1).compare(times(9.0)) == ({}, "")
