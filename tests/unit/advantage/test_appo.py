"""APPO's advantage against plain loops in float64, and its properties."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_rollouts import MAX_TURNS, NUM_PROMPTS, Row, batches, trajectories_of, z_score

from a2tgpo.advantage.estimator import compute_advantages
from a2tgpo.advantage.turn_table import TurnAdvantages, build_turn_table
from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.trajectory import Branch, LogProbs, TokenIds, Trajectory, Turn

quick = settings(max_examples=80)
OUTCOMES = (-1.0, 0.0, 0.5, 1.0)


def with_branches(rows: list[Row], seed: int, *, outcomes: tuple[float, ...] = OUTCOMES) -> list[Trajectory]:
    """Return trajectories whose turns have 1 to 5 tokens, with up to 4 inner branches each."""
    draw, made = random.Random(seed), []
    for t in trajectories_of(rows):
        turns = [with_tokens(turn, draw.randint(1, 5)) for turn in t.turns]
        t = dataclasses.replace(t, turns=turns)
        for place in range(draw.randint(0, 4)):
            number = draw.randrange(len(turns))
            branch = Branch(
                parent=t.sample_index,
                root=t.sample_index,
                owners=(t.sample_index,) * number,
                num_tokens=draw.randint(1, len(turns[number].tokens)),
            )
            t.inner_branches.append(
                dataclasses.replace(
                    t,
                    sample_index=1000 + place,
                    turns=turns[: number + 1],
                    branch=branch,
                    inner_branches=[],
                    outcome_reward=draw.choice(outcomes),
                    reward_error="the judge is away" if draw.random() < 0.1 else None,
                )
            )
        made.append(t)
    return made


def with_tokens(turn: Turn, count: int) -> Turn:
    return dataclasses.replace(turn, tokens=TokenIds([3] * count), rollout_logprobs=LogProbs([-1.0] * count))


def computed(
    trajectories: list[Trajectory], name: str = "appo", *, keep_single: bool = False, **fields
) -> TurnAdvantages:
    table = build_turn_table(
        trajectories, num_prompts=NUM_PROMPTS, max_turns=MAX_TURNS, keep_single=keep_single
    )
    return compute_advantages(table, AlgorithmConfig(advantage=name, **fields), dp_group=None)


def by_token(found: TurnAdvantages, trajectories: list[Trajectory]) -> list[list[float]]:
    """Return the advantage of each sampled token of each trajectory."""
    lengths = [torch.tensor([len(turn.tokens) for turn in t.turns]) for t in trajectories]
    of_turns = [
        row[: len(t.turns)].repeat_interleave(length)
        for row, t, length in zip(found.advantages, trajectories, lengths, strict=True)
    ]
    offsets = found.token_offsets or [torch.zeros_like(row) for row in of_turns]
    return [(row + own).tolist() for row, own in zip(of_turns, offsets, strict=True)]


def plain(trajectories: list[Trajectory], *, by_std: bool = True) -> list[list[float]]:
    judged = [(t, b) for t in trajectories for b in t.inner_branches if b.reward_error is None]
    found = []
    for t in trajectories:
        group = [other.outcome_reward for other in trajectories if other.prompt_index == t.prompt_index]
        pool = [b.outcome_reward for other, b in judged if other.prompt_index == t.prompt_index]
        own = [b for other, b in judged if other is t]
        row = []
        for number, turn in enumerate(t.turns):
            for k in range(len(turn.tokens)):
                shared = [
                    z_score(b.outcome_reward, pool, by_std=by_std, sample=True)
                    for b in own
                    if number < len(b.branch.owners)
                    or (number == len(b.branch.owners) and k < b.branch.num_tokens)
                ]
                value = z_score(t.outcome_reward, group, by_std=by_std, sample=True)
                row.append(value + (sum(shared) / len(shared) if shared else 0.0))
        found.append(row)
    return found


@quick
@given(batches(), st.integers(0, 10**6), st.booleans())
def test_advantages_of_tokens_equal_the_plain_loops(rows, seed, by_std):
    trajectories = with_branches(rows, seed)
    found = by_token(computed(trajectories, normalize_by_std=by_std), trajectories)
    for mine, expect in zip(found, plain(trajectories, by_std=by_std), strict=True):
        assert mine == pytest.approx(expect, rel=0, abs=1e-10)


@quick
@given(batches(), st.integers(0, 10**6))
def test_the_advantage_of_a_turn_is_the_mean_over_its_tokens(rows, seed):
    trajectories = with_branches(rows, seed)
    found = computed(trajectories)
    for t, row, offsets in zip(trajectories, found.advantages, found.token_offsets, strict=True):
        assert not row[t.num_process_turns + 1 :].any()
        for of_turn in offsets.split([len(turn.tokens) for turn in t.turns]):
            assert abs(of_turn.sum().item()) < 1e-12


@quick
@given(batches(), st.integers(0, 10**6), st.booleans(), st.booleans())
def test_without_branches_or_with_equal_outcomes_it_is_grpos_to_the_bit(rows, seed, are_equal, keep_single):
    trajectories = with_branches(rows, seed, outcomes=(0.5,))
    if not are_equal:
        for t in trajectories:
            t.inner_branches.clear()
    mine = computed(trajectories, keep_single=keep_single)
    grpo = computed(trajectories, "grpo", keep_single=keep_single)
    assert torch.equal(mine.advantages, grpo.advantages)
    assert all(not offsets.any() for offsets in mine.token_offsets)


@quick
@given(batches(), st.integers(0, 10**6), st.randoms())
def test_the_order_of_branches_and_trajectories_changes_nothing(rows, seed, draw):
    trajectories = with_branches(rows, seed)
    expect = by_token(computed(trajectories), trajectories)
    places = draw.sample(range(len(trajectories)), len(trajectories))
    shuffled = [trajectories[place] for place in places]
    for t in shuffled:
        draw.shuffle(t.inner_branches)
    found = by_token(computed(shuffled), shuffled)
    for place, mine in zip(places, found, strict=True):
        assert mine == pytest.approx(expect[place], rel=0, abs=1e-12)


def test_branches_teach_even_a_group_of_one():
    (t,) = with_branches([Row(prompt=0, gains=(), outcome=1.0)], seed=0)
    turn = with_tokens(t.turns[0], 4)
    t = dataclasses.replace(t, turns=[turn], inner_branches=[])
    for count, outcome in ((1, 1.0), (3, -1.0)):
        branch = Branch(parent=0, root=0, owners=(), num_tokens=count)
        inner = dataclasses.replace(t, branch=branch, outcome_reward=outcome, inner_branches=[])
        t.inner_branches.append(inner)
    high = 1 / 2**0.5
    for keep_single, outcome in ((False, 0.0), (True, 1.0)):
        (found,) = by_token(computed([t], keep_single=keep_single), [t])
        expect = [outcome, outcome - high, outcome - high, outcome]
        assert found == pytest.approx(expect, abs=1e-5)


def test_no_trajectory_is_left_out_for_lack_of_tokens():
    t = trajectories_of([Row(prompt=1, gains=(), outcome=1.0)])[0]
    silent = dataclasses.replace(t, turns=[])
    found = computed([silent, t])
    assert [offsets.numel() for offsets in found.token_offsets] == [0, 1]
