"""Properties that advantages must have on any batch. The general properties are also checked for every new method.

Unless a test says otherwise, gains are multiples of 1/64, so sums over a group are exact and equal gains stay equal.
Thus no rounding error is divided by the floor of a standard deviation, and comparisons can allow a difference of at
most 1e-12, or require equal bits.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from a2tgpo.advantage.estimator import compute_advantages
from a2tgpo.advantage.turn_table import TurnAdvantages, TurnTable, build_turn_table
from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.config.method_part import ADVANTAGE
from a2tgpo.trajectory import Call, Trajectory, Turn

MAX_TURNS, MAX_PROMPTS, MAX_ROLLOUTS = 4, 6, 8
OUTCOME_ENDS = ("turn_group", "igpo_joint", "igpo_separate", "grpo")
"""Methods whose advantage of the final turn is the outcome alone."""
GAINS_APART = ("turn_group", "igpo_separate", "mt_grpo")
"""Methods that normalise gains and outcomes separately."""
BY_GAIN = ("turn_group", "igpo_joint", "igpo_separate", "mt_grpo")
quick = settings(max_examples=30)
"""Settings for tests whose examples are whole batches, which are slow to draw."""

grid_gains = st.integers(-64, 64).map(lambda k: k / 64)
outcomes = st.sampled_from([-1.0, 0.0, 0.5, 1.0])


@dataclass(frozen=True)
class Rollout:
    prompt: int
    gains: tuple[float | None, ...]
    outcome: float


def batches(gains=grid_gains, *, missing=True, prompts=3, min_size=1):
    rollouts = st.builds(
        Rollout,
        prompt=st.integers(0, prompts - 1),
        gains=st.lists(st.none() | gains if missing else gains, max_size=MAX_TURNS).map(tuple),
        outcome=outcomes,
    )
    return st.lists(rollouts, min_size=min_size, max_size=MAX_ROLLOUTS)


def full_batches(gains=grid_gains):
    """Return a strategy for two prompts with four rollouts each, which have all turns."""
    row = st.tuples(*[gains] * MAX_TURNS)
    return st.tuples(*[st.builds(Rollout, st.just(i // 4), row, outcomes) for i in range(8)])


def table_of(batch) -> TurnTable:
    trajectories = [
        Trajectory(
            prompt_index=rollout.prompt,
            prompt_id="",
            sample_index=sample,
            prompt_tokens=[0],
            turns=[
                # turns 2 and 4 start from equal states, which gigpo compares
                *(
                    Turn(
                        tokens=[1],
                        rollout_logprobs=[0.0],
                        calls=[Call(tool="search", arguments="q")],
                        info_gain=gain,
                        observation_tokens=[column % 2],
                    )
                    for column, gain in enumerate(rollout.gains)
                ),
                Turn(tokens=[2], rollout_logprobs=[0.0]),
            ],
            stop_reason="answer",
            outcome_reward=rollout.outcome,
        )
        for sample, rollout in enumerate(batch)
    ]
    return build_turn_table(trajectories, num_prompts=MAX_PROMPTS, max_turns=MAX_TURNS)


def advantages_of(batch, name: str, **fields) -> TurnAdvantages:
    return compute_advantages(table_of(batch), AlgorithmConfig(advantage=name, **fields), dp_group=None)


def map_gains(batch, function):
    """Return the batch with every gain replaced by function(column, gain)."""
    return [
        replace(r, gains=tuple(g if g is None else function(t, g) for t, g in enumerate(r.gains)))
        for r in batch
    ]


def assert_equal(got: TurnAdvantages, expect: TurnAdvantages, *, rows=slice(None), atol: float = 0.0) -> None:
    """Check that `got` equals the given rows of `expect`."""
    for field in ("advantages", "normalized_gain", "normalized_outcome"):
        close = {"rtol": 0, "atol": atol, "msg": lambda text, field=field: f"{field}: {text}"}
        torch.testing.assert_close(getattr(got, field), getattr(expect, field)[rows], **close)


# --- What holds for every method. ---


@pytest.mark.parametrize("name", ADVANTAGE.names())
@quick
@given(
    batches(),
    st.permutations(range(MAX_ROLLOUTS)),
    st.permutations(range(MAX_PROMPTS)),
    st.sampled_from([0.5, 1.0]),
)
def test_neither_the_order_of_rollouts_nor_the_numbering_of_prompts_matters(name, batch, order, names, gamma):
    order = [row for row in order if row < len(batch)]
    shuffled = [replace(batch[row], prompt=names[batch[row].prompt]) for row in order]
    plain = advantages_of(batch, name, gamma=gamma)
    assert_equal(advantages_of(shuffled, name, gamma=gamma), plain, rows=order, atol=1e-12)


@pytest.mark.parametrize("name", ADVANTAGE.names())
@quick
@given(batches(prompts=1), batches(st.floats(-1e8, 1e8)), st.booleans())
def test_a_prompt_is_not_touched_by_what_other_prompts_hold(name, batch, others, first):
    others = [replace(rollout, prompt=rollout.prompt + 1) for rollout in others]
    together = advantages_of(others + batch if first else batch + others, name)
    alone = advantages_of(batch, name)
    rows = slice(len(others), None) if first else slice(len(batch))
    assert_equal(alone, together, rows=rows)


@pytest.mark.parametrize("name", ADVANTAGE.names())
@quick
@given(batches())
def test_what_is_good_turned_bad_negates_the_advantages(name, batch):
    mirrored = [replace(r, outcome=-r.outcome) for r in map_gains(batch, lambda _, gain: -gain)]
    plain, negated = advantages_of(batch, name), advantages_of(mirrored, name)
    for field in ("advantages", "normalized_gain", "normalized_outcome"):
        torch.testing.assert_close(-getattr(negated, field), getattr(plain, field), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ADVANTAGE.names())
@quick
@given(
    batches(st.sampled_from([1e8, -1e8, 99999999.5, 1e-300, -1e-300, 5e-324, 0.0, 1.0, math.nan, -math.inf])),
    st.sampled_from([0.0, 1.0]),
    st.booleans(),
)
def test_huge_and_tiny_gains_give_finite_advantages(name, batch, gamma, by_std):
    result = advantages_of(batch, name, gamma=gamma, normalize_by_std=by_std)
    assert result.advantages.isfinite().all()
    assert result.normalized_gain.isfinite().all()


@pytest.mark.parametrize("name", ADVANTAGE.names())
@quick
@given(batches(), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_a_gain_that_is_not_finite_is_the_same_as_none(name, batch, value):
    broken = [replace(r, gains=tuple(value if g is None else g for g in r.gains)) for r in batch]
    assert_equal(advantages_of(broken, name), advantages_of(batch, name))


@pytest.mark.parametrize("name", OUTCOME_ENDS)
@quick
@given(batches(), st.sampled_from([0.0, 0.9, 1.0]))
def test_the_final_turn_gets_the_outcome_alone_also_where_it_is_the_only_one(name, batch, gamma):
    result = advantages_of(batch, name, gamma=gamma)
    for row, rollout in enumerate(batch):
        depth = len(rollout.gains)
        assert result.advantages[row, depth] == result.normalized_outcome[row]
        assert (result.advantages[row, depth + 1 :] == 0).all()
    if name != "igpo_joint":
        directly = advantages_of([replace(rollout, gains=()) for rollout in batch], name)
        assert torch.equal(result.normalized_outcome, directly.normalized_outcome)


# --- The normalised gain. ---


@pytest.mark.parametrize("name", GAINS_APART)
@quick
@given(
    batches(st.integers(-4, 4).map(lambda k: 256.0 * k)),
    st.integers(16, 1600).map(lambda k: k / 16),
    st.integers(-16000, 16000).map(lambda k: k / 16),
)
def test_normalized_gains_ignore_unit_and_origin(name, batch, scale, shift):
    """This holds up to the stabilisers. Multiples of 256 that are not all equal have a standard deviation of at least
    44, even if only one of 32 is different. So eps = 1e-6 changes no normalised gain by more than 6 * 2e-6 / 44 <
    4e-7.
    """
    moved = map_gains(batch, lambda _, gain: scale * gain + shift)
    torch.testing.assert_close(
        advantages_of(moved, name).normalized_gain,
        advantages_of(batch, name).normalized_gain,
        rtol=0,
        atol=4e-7,
    )


@pytest.mark.parametrize("name", GAINS_APART)
@quick
@given(full_batches(), st.integers(-(2**20), 2**20))
def test_a_shift_that_floats_can_carry_changes_no_bit(name, batch, shift):
    moved = map_gains(batch, lambda _, gain: gain + shift)
    assert_equal(advantages_of(moved, name), advantages_of(batch, name))


@quick
@given(full_batches(), st.tuples(*[st.integers(-(2**20), 2**20)] * MAX_TURNS))
def test_turn_groups_ignore_an_origin_of_each_turn(batch, shifts):
    moved = map_gains(batch, lambda column, gain: gain + shifts[column])
    assert_equal(advantages_of(moved, "turn_group"), advantages_of(batch, "turn_group"))


@quick
@given(batches(st.floats(-1e6, 1e6), prompts=2))
def test_a_bucket_of_m_bounds_its_gains_by_the_root_of_m_less_one(batch):
    table = table_of(batch)
    result = compute_advantages(table, AlgorithmConfig(), dp_group=None)
    buckets = table.turn_bucket[table.has_gain]
    members = torch.bincount(buckets, minlength=table.num_turn_buckets)
    bound = (members[table.turn_bucket] - 1).clamp(min=0).double().sqrt()
    assert (result.normalized_gain.abs() <= bound * (1 + 1e-9)).all()
    turn_part = result.advantages - result.normalized_outcome[:, None]
    for row, rollout in enumerate(batch):
        for column in range(len(rollout.gains)):
            terms = len(rollout.gains) - column
            limit = bound[row, column : len(rollout.gains)].sum() / math.sqrt(terms)
            assert turn_part[row, column].abs() <= limit * (1 + 1e-9) + 1e-12


@quick
@given(batches(prompts=1, min_size=2), st.integers(0, MAX_TURNS - 1))
def test_a_turn_where_all_gain_nothing_is_zero_and_keeps_its_place(batch, column):
    plain = advantages_of(batch, "turn_group").normalized_gain
    for constant in (0.0, 0.375):
        flat = map_gains(batch, lambda t, gain, constant=constant: constant if t == column else gain)
        expect = plain.clone()
        expect[:, column] = 0.0
        assert torch.equal(advantages_of(flat, "turn_group").normalized_gain, expect)


@quick
@given(batches(), st.lists(grid_gains, min_size=1, max_size=2), st.data())
def test_turns_that_no_sibling_reaches_are_neutral(batch, extra, data):
    batch = [replace(rollout, gains=rollout.gains[:2]) for rollout in batch]
    row = data.draw(st.integers(0, len(batch) - 1))
    own = batch[row].gains
    deep = replace(batch[row], gains=own + (None,) * (2 - len(own)) + tuple(extra))
    result = advantages_of([*batch[:row], deep, *batch[row + 1 :]], "turn_group")
    assert torch.equal(result.normalized_gain, advantages_of(batch, "turn_group").normalized_gain)


@quick
@given(batches(missing=False), st.data())
def test_a_missing_gain_leaves_its_bucket_as_if_the_rollout_were_absent(batch, data):
    places = [(row, column) for row, r in enumerate(batch) for column in range(len(r.gains))]
    assume(places)
    row, column = data.draw(st.sampled_from(places))
    gains = batch[row].gains
    holed = replace(batch[row], gains=(*gains[:column], None, *gains[column + 1 :]))
    result = advantages_of([*batch[:row], holed, *batch[row + 1 :]], "turn_group").normalized_gain
    without = advantages_of(batch[:row] + batch[row + 1 :], "turn_group").normalized_gain
    expect = advantages_of(batch, "turn_group").normalized_gain
    expect[:, column] = torch.cat([without[:row, column], torch.zeros(1).double(), without[row:, column]])
    torch.testing.assert_close(result, expect, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", BY_GAIN)
@quick
@given(batches(), st.data())
def test_a_last_gain_that_is_missing_counts_in_no_statistics(name, batch, data):
    """The result is that of a rollout with one turn fewer, except that the turn exists."""
    shorter = [row for row, r in enumerate(batch) if len(r.gains) < MAX_TURNS]
    assume(shorter)
    row = data.draw(st.sampled_from(shorter))
    longer = replace(batch[row], gains=(*batch[row].gains, None))
    result = advantages_of([*batch[:row], longer, *batch[row + 1 :]], name)
    plain = advantages_of(batch, name)
    torch.testing.assert_close(result.normalized_gain, plain.normalized_gain, rtol=0, atol=0)
    torch.testing.assert_close(result.normalized_outcome, plain.normalized_outcome, rtol=0, atol=0)
    others = [i for i in range(len(batch)) if i != row]
    assert torch.equal(result.advantages[others], plain.advantages[others])


# --- Accumulation. ---


@pytest.mark.parametrize("rescale", [True, False])
@quick
@given(batches())
def test_discount_zero_leaves_a_turn_its_own_gain_and_one_sums_all_that_follow(rescale, batch):
    for gamma in (0.0, 1.0):
        result = advantages_of(batch, "turn_group", gamma=gamma, rescale=rescale)
        for row, rollout in enumerate(batch):
            depth = len(rollout.gains)
            gains = result.normalized_gain[row, :depth]
            total = gains if gamma == 0 else gains.flip(0).cumsum(0).flip(0)
            terms = torch.arange(depth, 0, -1).double()
            expect = result.normalized_outcome[row] + (total / terms.sqrt() if rescale else total)
            torch.testing.assert_close(result.advantages[row, :depth], expect, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["igpo_joint", "igpo_separate"])
@quick
@given(batches())
def test_pooled_advantages_accumulate_through_the_outcome(name, batch):
    own, total = advantages_of(batch, name, gamma=0.0), advantages_of(batch, name, gamma=1.0)
    for row, rollout in enumerate(batch):
        depth = len(rollout.gains)
        rewards = torch.cat([own.normalized_gain[row, :depth], own.normalized_outcome[row : row + 1]])
        assert torch.equal(own.advantages[row, : depth + 1], rewards)
        sums = rewards.flip(0).cumsum(0).flip(0)
        torch.testing.assert_close(total.advantages[row, : depth + 1], sums, rtol=0, atol=1e-12)


@quick
@given(batches(), st.sampled_from([0.0, 0.3, 2.0]))
def test_alpha_weighs_the_turns_part_and_nothing_else(batch, alpha):
    one, other = advantages_of(batch, "turn_group"), advantages_of(batch, "turn_group", alpha=alpha)
    for row, rollout in enumerate(batch):
        columns = slice(len(rollout.gains) + 1)
        outcome = one.normalized_outcome[row]
        expect = outcome + alpha * (one.advantages[row, columns] - outcome)
        torch.testing.assert_close(other.advantages[row, columns], expect, rtol=0, atol=1e-12)
