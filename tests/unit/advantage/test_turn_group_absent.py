import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_rollouts import MAX_TURNS, NUM_PROMPTS, Row, batches, trajectories_of, z_score

from a2tgpo.advantage.estimator import compute_advantages
from a2tgpo.advantage.turn_table import TurnAdvantages, build_turn_table
from a2tgpo.config.algorithm import AlgorithmConfig

quick = settings(max_examples=40)


def advantages_of(batch, **fields) -> TurnAdvantages:
    table = build_turn_table(trajectories_of(batch), num_prompts=NUM_PROMPTS, max_turns=MAX_TURNS)
    config = AlgorithmConfig(**{"advantage": "turn_group_absent", **fields})
    return compute_advantages(table, config, dp_group=None)


def reference(batch, *, gamma, alpha, rescale, by_std) -> list[list[float]]:
    """Return the result of the equations in the method's docstring, computed with loops."""
    rows = []
    for row in batch:
        siblings = [r for r in batch if r.prompt == row.prompt]
        deepest = max(len(r.gains) for r in siblings)
        normalized = []
        for turn in range(deepest):
            group = [r.gains[turn] if turn < len(r.gains) else 0.0 for r in siblings]
            own = row.gains[turn] if turn < len(row.gains) else 0.0
            known = [gain for gain in group if gain is not None]
            normalized.append(0.0 if own is None else z_score(own, known, by_std=by_std))
        outcome = z_score(row.outcome, [r.outcome for r in siblings], by_std=by_std)
        values = []
        for turn in range(len(row.gains) + 1):
            later = range(turn, deepest)
            total = sum(gamma ** (k - turn) * normalized[k] for k in later)
            values.append(alpha * total / (len(later) ** 0.5 if rescale and later else 1.0) + outcome)
        rows.append(values + [0.0] * (MAX_TURNS - len(row.gains)))
    return rows


@quick
@given(
    batches(),
    st.sampled_from([0.5, 1.0]),
    st.sampled_from([0.3, 1.0]),
    st.booleans(),
    st.booleans(),
)
def test_advantages_equal_the_plain_loops(batch, gamma, alpha, rescale, by_std):
    got = advantages_of(batch, gamma=gamma, alpha=alpha, rescale=rescale, normalize_by_std=by_std)
    expect = reference(batch, gamma=gamma, alpha=alpha, rescale=rescale, by_std=by_std)
    expect = torch.tensor(expect, dtype=torch.float64)
    torch.testing.assert_close(got.advantages, expect, rtol=0, atol=1e-10)


@quick
@given(batches(missing=False))
def test_unscaled_sums_are_future_gains_less_the_mean_of_the_group(batch):
    got = advantages_of(batch, rescale=False, normalize_by_std=False)
    for index, row in enumerate(batch):
        siblings = [r for r in batch if r.prompt == row.prompt]
        for turn in range(len(row.gains) + 1):
            future = [sum(r.gains[turn:]) for r in siblings]
            expect = sum(row.gains[turn:]) - sum(future) / len(future) if len(siblings) > 1 else 0.0
            value = got.advantages[index, turn] - got.normalized_outcome[index]
            assert value.item() == pytest.approx(expect, abs=1e-10)


@quick
@given(st.lists(st.tuples(*[st.integers(-64, 64).map(lambda k: k / 64)] * 3), min_size=2, max_size=8))
def test_it_is_turn_group_if_all_rollouts_take_the_same_turns(gains):
    batch = [Row(0, row, float(index % 2)) for index, row in enumerate(gains)]
    assert torch.equal(
        advantages_of(batch).advantages, advantages_of(batch, advantage="turn_group").advantages
    )


def test_going_on_earns_credit_if_the_next_search_is_worth_it():
    """In 125 groups of 16 rollouts, half of the rollouts search twice, and the second search gains 0.3."""
    rng = random.Random(0)
    went_on, stopped = {}, {}
    for name in ("turn_group", "turn_group_absent"):
        on, off = [], []
        for _ in range(125):
            batch = [
                Row(
                    0,
                    (rng.gauss(0, 0.1), rng.gauss(0.3, 0.1)) if rng.random() < 0.5 else (rng.gauss(0, 0.1),),
                    0.0,
                )
                for _ in range(16)
            ]
            result = advantages_of(batch, advantage=name).advantages
            for index, row in enumerate(batch):
                (on if len(row.gains) == 2 else off).append(result[index, 1].item())
        went_on[name], stopped[name] = sum(on) / len(on), sum(off) / len(off)
    assert abs(went_on["turn_group"]) < 1e-9 and abs(stopped["turn_group"]) < 1e-9
    assert went_on["turn_group_absent"] > 0.8 and stopped["turn_group_absent"] < -0.8


def test_a_turn_with_an_unknown_gain_was_taken_and_is_no_zero():
    batch = [Row(0, (0.2, None), 0.0), Row(0, (0.2, 0.6), 0.0), Row(0, (0.2,), 0.0)]
    gains = advantages_of(batch).normalized_gain[:, 1]
    torch.testing.assert_close(gains, torch.tensor([0.0, 1.0, 0.0]).double(), rtol=0, atol=1e-4)
