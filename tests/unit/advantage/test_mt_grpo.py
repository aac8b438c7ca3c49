from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_rollouts import MAX_TURNS, NUM_PROMPTS, Row, batches, trajectories_of, z_score

from a2tgpo.advantage.estimator import compute_advantages
from a2tgpo.advantage.turn_table import build_turn_table
from a2tgpo.config.algorithm import AlgorithmConfig

quick = settings(max_examples=40)


def advantages_of(batch, **fields) -> torch.Tensor:
    """Return the advantages if the numbers of the rows are the scores of the turns."""
    made = trajectories_of(batch)
    for turn in (turn for trajectory in made for turn in trajectory.turns):
        turn.score, turn.info_gain = turn.info_gain, None
    table = build_turn_table(made, num_prompts=NUM_PROMPTS, max_turns=MAX_TURNS, turn_signal="scores")
    config = AlgorithmConfig(**{"advantage": "mt_grpo", "turn_signal": "scores", **fields})
    return compute_advantages(table, config, dp_group=None).advantages


def reward(row: Row) -> float:
    return row.outcome + sum(gain or 0.0 for gain in row.gains)


def grpo(value: float, group: list[float], by_std: bool) -> float:
    """Return `value` normalised in `group`, or `value` itself if the group has one member."""
    if len(group) > 1:
        return z_score(value, group, by_std=by_std, sample=True)
    return value / (1 + 1e-6) if by_std else value


@quick
@given(batches(), st.sampled_from([0.0, 0.3, 1.0]), st.booleans())
def test_advantages_equal_the_plain_loops(batch, alpha, by_std):
    result = advantages_of(batch, alpha=alpha, normalize_by_std=by_std).tolist()
    for got, row in zip(result, batch, strict=True):
        siblings = [r for r in batch if r.prompt == row.prompt]
        outcome = grpo(row.outcome, [r.outcome for r in siblings], by_std)
        if not row.gains:
            outcome = grpo(row.outcome, [reward(r) for r in siblings], by_std)
        expect = []
        for turn, own in enumerate(row.gains):
            group = [r.gains[turn] for r in siblings if len(r.gains) > turn and r.gains[turn] is not None]
            expect.append(outcome + (0.0 if own is None else alpha * z_score(own, group, by_std=by_std)))
        assert got[: len(row.gains) + 1] == pytest.approx([*expect, outcome], rel=0, abs=1e-10)
        assert got[len(row.gains) + 1 :] == [0.0] * (MAX_TURNS - len(row.gains))


@quick
@given(batches())
def test_without_weight_of_turns_it_is_grpo_if_all_rollouts_call_a_tool(batch):
    batch = [row if row.gains else replace(row, gains=(0.5,)) for row in batch]
    assert torch.equal(advantages_of(batch, alpha=0.0), advantages_of(batch, advantage="grpo"))


@quick
@given(batches(), st.integers(0, MAX_TURNS - 1))
def test_the_reward_of_a_turn_moves_the_advantages_of_its_own_turn_group_only(batch, turn):
    batch = [row if row.gains else replace(row, gains=(0.5,)) for row in batch]
    other = [
        replace(r, gains=tuple(g if g is None or t != turn else -2 * g for t, g in enumerate(r.gains)))
        for r in batch
    ]
    kept = [column for column in range(MAX_TURNS + 1) if column != turn]
    before, after = advantages_of(batch), advantages_of(other)
    # If a rollout ends at this turn, the column contains its final turn.
    assert torch.equal(before[:, kept], after[:, kept])


def test_a_rollout_that_calls_no_tool_misses_the_rewards_of_turns():
    batch = [Row(0, (1.0,), 1.0), Row(0, (1.0,), 0.0), Row(0, (), 1.0), Row(0, (), 0.0)]
    got = advantages_of(batch, normalize_by_std=False)
    assert got[0, 1].item() == pytest.approx(0.5) and got[2, 0].item() == pytest.approx(0.0)
    assert got[3, 0].item() == pytest.approx(-1.0)
