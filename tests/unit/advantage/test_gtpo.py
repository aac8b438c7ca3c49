from dataclasses import replace

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
    return compute_advantages(table, AlgorithmConfig(**{"advantage": "gtpo", **fields}), dp_group=None)


def returns(row: Row, gamma: float, alpha: float) -> list[float]:
    rewards = [alpha * (gain or 0.0) for gain in row.gains] + [0.0] * (row.num_turns - len(row.gains))
    rewards[-1] += row.outcome
    return [sum(gamma ** (k - t) * rewards[k] for k in range(t, row.num_turns)) for t in range(row.num_turns)]


@quick
@given(batches(), st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.sampled_from([0.0, 0.3, 1.0]), st.booleans())
def test_advantages_equal_the_plain_loops(batch, gamma, alpha, by_std):
    result = advantages_of(batch, gamma=gamma, alpha=alpha, normalize_by_std=by_std).advantages
    for got, row in zip(result.tolist(), batch, strict=True):
        group = [value for r in batch if r.prompt == row.prompt for value in returns(r, gamma, alpha)]
        # Returns that differ only in the last bit are divided by eps, so such a group needs a larger tolerance than
        # 1e-10.
        atol = 1e-10 if max(group) - min(group) > 1e-9 or not by_std else 1e-6
        expect = [z_score(value, group, by_std=by_std, sample=True) for value in returns(row, gamma, alpha)]
        assert got[: row.num_turns] == pytest.approx(expect, rel=0, abs=atol)
        assert got[row.num_turns :] == [0.0] * (MAX_TURNS + 1 - row.num_turns)


@quick
@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=2, max_size=8), st.booleans())
def test_without_gains_and_discount_the_centred_advantages_are_those_of_grpo(outcomes, final):
    """This holds if all rollouts have the same number of turns. Otherwise long rollouts have more weight."""
    batch = [Row(0, (0.3, 0.1), outcome, final) for outcome in outcomes]
    fields = {"gamma": 1.0, "alpha": 0.0, "normalize_by_std": False}
    own, grpo = advantages_of(batch, **fields), advantages_of(batch, **fields, advantage="grpo")
    turns = 3 if final else 2
    torch.testing.assert_close(own.advantages[:, :turns], grpo.advantages[:, :turns], rtol=0, atol=1e-12)


@quick
@given(batches(), st.sampled_from([0.5, 1.0]))
def test_the_advantages_of_all_turns_of_a_prompt_add_up_to_zero(batch, gamma):
    result = advantages_of(batch, gamma=gamma).advantages
    for prompt in range(NUM_PROMPTS):
        rows = [index for index, row in enumerate(batch) if row.prompt == prompt]
        assert result[rows].sum().item() == pytest.approx(0.0, abs=1e-9)


@quick
@given(batches(), st.sampled_from([2.0, 16.0]))
def test_advantages_ignore_the_unit_of_all_rewards(batch, scale):
    scaled = [
        replace(r, outcome=scale * r.outcome, gains=tuple(g if g is None else scale * g for g in r.gains))
        for r in batch
    ]
    plain, other = advantages_of(batch).advantages, advantages_of(scaled).advantages
    # eps is 1e-6, and the standard deviations are at least 1/64
    torch.testing.assert_close(other, plain, rtol=0, atol=1e-3)
