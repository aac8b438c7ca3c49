import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a2tgpo.advantage.accumulate import accumulate_process_turns
from a2tgpo.advantage.estimator import compute_advantages
from a2tgpo.advantage.group_norm import group_sums, index_groups, normalize_groups
from a2tgpo.advantage.turn_groups import normalize_turn_groups
from a2tgpo.advantage.turn_table import build_turn_table
from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.config.method_part import ADVANTAGE
from a2tgpo.trajectory import Call, Trajectory, Turn

A2TGPO = AlgorithmConfig()
rollouts = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.lists(st.one_of(st.none(), st.floats(-1, 1)), max_size=4),
        st.sampled_from([-1.0, 0.0, 1.0]),
    ),
    min_size=1,
    max_size=12,
)


def make_trajectory(prompt: int, gains: list[float | None], outcome: float, final: bool = True) -> Trajectory:
    turns = [
        Turn(tokens=[1], rollout_logprobs=[0.0], calls=[Call(tool="search", arguments="q")], info_gain=gain)
        for gain in gains
    ]
    turns += [Turn(tokens=[2], rollout_logprobs=[0.0])] * final
    return Trajectory(
        prompt_index=prompt,
        prompt_id=str(prompt),
        sample_index=0,
        prompt_tokens=[0],
        turns=turns,
        stop_reason="answer",
        outcome_reward=outcome,
    )


def table_of(items, num_prompts=3, max_turns=4, order=None):
    """Return the table of `items`, whose trajectories are put into `order` if it is given."""
    trajectories = [make_trajectory(*item) for item in items]
    for index, trajectory in enumerate(trajectories):
        trajectory.sample_index = index
    if order is not None:
        trajectories = [trajectories[index] for index in order]
    return build_turn_table(trajectories, num_prompts=num_prompts, max_turns=max_turns)


def reference(items):
    """Return A²TGPO's advantages, computed with loops over NumPy floats."""
    advantages = []
    normalized = {}
    for turn in range(4):
        for prompt in range(3):
            rows = [
                i
                for i, (p, g, _) in enumerate(items)
                if p == prompt and len(g) > turn and g[turn] is not None
            ]
            values = np.array([items[i][1][turn] for i in rows])
            for i in rows:
                z = (items[i][1][turn] - values.mean()) / (math.sqrt(values.var() + 1e-8) + 1e-6)
                normalized[i, turn] = z if len(rows) > 1 else 0.0
    for i, (prompt, gains, outcome) in enumerate(items):
        group = np.array([r for p, _, r in items if p == prompt])
        base = 0.0
        if len(group) > 1:
            base = (outcome - group.mean()) / (math.sqrt(group.var() + 1e-8) + 1e-6)
        n = len(gains)
        row = []
        for t in range(n):
            total = sum(normalized.get((i, k), 0.0) for k in range(t, n))
            row.append(total / math.sqrt(n - t) + base)
        advantages.append([*row, base])
    return advantages


@given(rollouts)
def test_turn_group_advantages_equal_the_plain_loops(items):
    result = compute_advantages(table_of(items), A2TGPO, dp_group=None)
    for row, expect in enumerate(reference(items)):
        got = result.advantages[row].tolist()
        # a turn group whose members differ only by rounding is divided by a floor of 1e-4
        np.testing.assert_allclose(got[: len(expect)], expect, atol=1e-9)
        assert got[len(expect) :] == [0.0] * (len(got) - len(expect))


@given(rollouts, st.randoms())
def test_order_of_rollouts_does_not_matter(items, random):
    order = list(range(len(items)))
    random.shuffle(order)
    for name in ADVANTAGE.names():
        config = AlgorithmConfig(advantage=name)
        plain = compute_advantages(table_of(items), config, dp_group=None).advantages
        shuffled = compute_advantages(table_of(items, order=order), config, dp_group=None).advantages
        torch.testing.assert_close(shuffled, plain[order], rtol=0, atol=1e-9)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=16), st.floats(-1e6, 1e6))
def test_normalisation_ignores_a_shift_large_against_the_spread(gains, shift):
    values = torch.tensor(gains, dtype=torch.float64)
    shifted = values + shift
    index = torch.zeros(len(gains), dtype=torch.int64)
    exact = normalize_groups(shifted - shift, index, num_groups=1, dp_group=None)
    torch.testing.assert_close(
        normalize_groups(shifted, index, num_groups=1, dp_group=None), exact, rtol=0, atol=1e-5
    )


@settings(max_examples=50)
@given(st.lists(st.floats(-5, 5), min_size=3, max_size=16, unique=True), st.floats(0.1, 100))
def test_normalisation_is_invariant_to_positive_scaling(gains, scale):
    values = torch.tensor(gains, dtype=torch.float64)
    if values.std() < 0.1:
        return
    index = torch.zeros(len(gains), dtype=torch.int64)
    plain = normalize_groups(values, index, num_groups=1, dp_group=None)
    scaled = normalize_groups(values * scale, index, num_groups=1, dp_group=None)
    torch.testing.assert_close(scaled, plain, rtol=1e-3, atol=1e-4)


def test_singleton_bucket_gives_zero_gain_and_equal_outcomes_give_zero():
    result = compute_advantages(table_of([(0, [0.7], 1.0), (0, [], 1.0)]), A2TGPO, dp_group=None)
    assert result.advantages.abs().max() == 0.0


def test_a_gain_of_exactly_zero_is_a_member_of_its_bucket():
    table = table_of([(0, [0.0], 0.0), (0, [1.0], 0.0)])
    normalized, _ = normalize_turn_groups(table, table.has_gain, A2TGPO, dp_group=None)
    torch.testing.assert_close(normalized[:, 0], torch.tensor([-1.0, 1.0]).double(), atol=1e-4, rtol=0)


def test_a_missing_gain_is_neutral_and_shifts_no_other_turn():
    items = [(0, [None, 0.5], 0.0), (0, [0.2, 0.1], 0.0), (0, [0.4, 0.0], 0.0)]
    table = table_of(items)
    normalized, _ = normalize_turn_groups(table, table.has_gain, A2TGPO, dp_group=None)
    assert normalized[0, 0] == 0.0
    torch.testing.assert_close(normalized[1:, 0], torch.tensor([-1.0, 1.0]).double(), atol=1e-4, rtol=0)
    assert normalized[0, 1] > 1.0


def test_a_failed_call_is_neutral_and_leaves_its_siblings_statistics_alone():
    """With `algorithm.failed_calls=count` the call is treated like any other. Outcomes and all other turns are the
    same.
    """
    items = [(0, [-0.9, 0.5], 1.0), (0, [0.2, 0.1], 0.0), (0, [0.4, 0.0], 0.0)]
    trajectories = [make_trajectory(*item) for item in items]
    trajectories[0].turns[0].calls = [Call(tool="search", arguments="q", failed=True)]
    results = {}
    for failed_calls in ("neutral", "count"):
        table = build_turn_table(trajectories, num_prompts=1, max_turns=2, failed_calls=failed_calls)
        results[failed_calls] = compute_advantages(table, A2TGPO, dp_group=None)
    missing = [(0, [None, 0.5], 1.0), *items[1:]]
    for failed_calls, alike in (("neutral", missing), ("count", items)):
        expected = compute_advantages(table_of(alike, num_prompts=1, max_turns=2), A2TGPO, dp_group=None)
        assert torch.equal(results[failed_calls].advantages, expected.advantages)
        assert torch.equal(results[failed_calls].normalized_gain, expected.normalized_gain)
    assert results["neutral"].normalized_gain[0, 0] == 0 > results["count"].normalized_gain[0, 0]
    torch.testing.assert_close(
        results["neutral"].normalized_gain[1:, 0], torch.tensor([-1.0, 1.0]).double(), atol=1e-4, rtol=0
    )


def test_non_finite_gain_is_treated_as_missing():
    table = table_of([(0, [float("nan")], 0.0), (0, [0.3], 0.0)])
    assert table.has_gain[:, 0].tolist() == [False, True]
    assert compute_advantages(table, A2TGPO, dp_group=None).advantages.isfinite().all()


def test_rescaling_divides_by_the_square_root_of_the_terms():
    gains = torch.tensor([[1.0, 1.0, 1.0, 0.0]]).double()
    scaled = accumulate_process_turns(gains, torch.tensor([3]), gamma=1.0, rescale=True)
    torch.testing.assert_close(scaled[0, :3], torch.tensor([3.0, 2.0, 1.0]).double().sqrt())
    plain = accumulate_process_turns(gains, torch.tensor([3]), gamma=0.5, rescale=False)
    assert plain.tolist() == [[1.75, 1.5, 1.0, 0.0]]


def test_a_trajectory_cut_after_an_observation_keeps_its_process_turns_only():
    trajectory = make_trajectory(0, [0.1, 0.2], -1.0, final=False)
    assert trajectory.num_process_turns == 2
    table = build_turn_table([trajectory], num_prompts=1, max_turns=4)
    assert table.has_gain.tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("name", ADVANTAGE.names())
def test_every_method_takes_an_empty_rank(name):
    result = compute_advantages(table_of([]), AlgorithmConfig(advantage=name), dp_group=None)
    assert result.advantages.shape == (0, 5)


@pytest.mark.parametrize(("keep_single", "expect"), [(True, 3.0 / (1 + 1e-6)), (False, 0.0)])
@pytest.mark.parametrize("sample_std", [True, False])
def test_a_group_of_one_keeps_its_value_or_gives_zero_as_asked(sample_std, keep_single, expect):
    values, index = torch.tensor([3.0, 1.0, 2.0]).double(), torch.tensor([0, 1, 1])
    settings = {"num_groups": 2, "dp_group": None, "sample_std": sample_std, "keep_single": keep_single}
    normalized = normalize_groups(values, index, **settings)
    assert normalized[0].item() == pytest.approx(expect, abs=1e-12)
    assert normalized[1].item() == pytest.approx(-math.sqrt(0.5 if sample_std else 1.0), rel=1e-5)


def test_groups_known_by_a_key_are_numbered_without_gaps():
    keys = torch.tensor([7, 2**62, -1, 7])
    index, num_groups = index_groups(keys, dp_group=None)
    assert (index.tolist(), num_groups) == ([1, 2, 0, 1], 3)
    sums = group_sums(torch.ones(1, 4).double(), index, num_groups=num_groups, dp_group=None)
    assert sums.tolist() == [[1.0, 2.0, 1.0]]
    assert index_groups(keys[:0], dp_group=None)[1] == 0


def test_a_group_index_out_of_range_is_refused():
    with pytest.raises(ValueError, match="outside"):
        normalize_groups(torch.ones(1).double(), torch.tensor([3]), num_groups=3, dp_group=None)


@given(rollouts)
def test_scores_of_turns_that_equal_the_gains_give_equal_advantages(items):
    layout = {"num_prompts": 4, "max_turns": 6}
    gained = [make_trajectory(*item) for item in items]
    scored = [make_trajectory(*item) for item in items]
    for turn in (turn for t in scored for turn in t.turns):
        turn.score, turn.info_gain = turn.info_gain, None
    for name in ADVANTAGE.names():
        config = AlgorithmConfig(advantage=name)
        tables = (
            build_turn_table(gained, **layout),
            build_turn_table(scored, **layout, turn_signal="scores"),
        )
        one, two = (compute_advantages(table, config, dp_group=None) for table in tables)
        assert torch.equal(one.advantages, two.advantages)
        assert torch.equal(one.normalized_gain, two.normalized_gain)
    neutral = build_turn_table(gained, **layout, turn_signal="scores")
    assert not neutral.has_gain.any()


def test_a_trajectory_whose_group_lost_all_others_has_no_outcome_advantage():
    alone = [make_trajectory(0, [], 1.0)]
    for keep_single, expect in ((True, 1.0 / (1 + 1e-6)), (False, 0.0)):
        table = build_turn_table(alone, num_prompts=1, max_turns=1, keep_single=keep_single)
        result = compute_advantages(table, AlgorithmConfig(advantage="grpo"), dp_group=None)
        assert result.advantages[0, 0].item() == pytest.approx(expect)
