import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_rollouts import z_score
from made_trees import Leaf, computed, forests, rows_of, trajectories_of

quick = settings(max_examples=60)


def at2po(trajectories, **fields):
    return rows_of(computed(trajectories, "at2po", **fields).advantages, trajectories)


def plain_values(trajectories, *, by_std=True) -> list[list[float]]:
    """Return the values that the method's docstring defines, by recursion over the tokens of the turns."""

    def path(trajectory, number):
        return tuple(tuple(turn.tokens) for turn in trajectory.turns[:number])

    def value(prompt, prefix):
        group = [t for t in trajectories if t.prompt_index == prompt]
        below = [t for t in group if path(t, len(prefix)) == prefix]
        if len(below[0].turns) == len(prefix):
            return z_score(below[0].outcome_reward, [t.outcome_reward for t in group], by_std=by_std)
        entropies = {}
        for t in below:
            logprobs = t.turns[len(prefix)].rollout_logprobs
            entropies[path(t, len(prefix) + 1)] = -sum(logprobs) / len(logprobs)
        total = sum(math.exp(entropy) for entropy in entropies.values())
        return sum(math.exp(entropy) / total * value(prompt, child) for child, entropy in entropies.items())

    return [
        [value(t.prompt_index, path(t, number + 1)) for number in range(len(t.turns))] for t in trajectories
    ]


@quick
@given(forests(), st.booleans())
def test_values_equal_the_plain_recursion(leaves, by_std):
    trajectories = trajectories_of(leaves)
    got = at2po(trajectories, normalize_by_std=by_std)
    for mine, expect in zip(got, plain_values(trajectories, by_std=by_std), strict=True):
        assert mine == pytest.approx(expect, rel=0, abs=1e-10)


@quick
@given(forests(branches=False))
def test_without_branches_every_turn_has_its_trajectorys_normalised_outcome(leaves):
    trajectories = trajectories_of(leaves)
    outcomes = computed(trajectories, "at2po").normalized_outcome.tolist()
    assert at2po(trajectories) == [
        [outcome] * len(t.turns) for t, outcome in zip(trajectories, outcomes, strict=True)
    ]


@quick
@given(forests())
def test_a_turns_value_lies_between_its_childrens_and_copies_have_one_value(leaves):
    trajectories = trajectories_of(leaves)
    found: dict = {}
    below: dict = {}
    for t, row in zip(trajectories, at2po(trajectories), strict=True):
        nodes = [(t.prompt_index, owner, index) for index, owner in enumerate(t.owners)]
        for node, value in zip(nodes, row, strict=True):
            assert found.setdefault(node, value) == value
        for node, child in zip(nodes, row[1:], strict=False):
            below.setdefault(node, []).append(child)
    for node, children in below.items():
        assert min(children) - 1e-12 <= found[node] <= max(children) + 1e-12


@quick
@given(forests(), st.randoms(), st.sampled_from([-2.0, 3.0]))
def test_neither_order_nor_level_of_the_outcomes_matters(leaves, rng, level):
    trajectories = trajectories_of(leaves)
    expect = at2po(trajectories)
    for trajectory in trajectories:
        trajectory.outcome_reward += level
    order = list(range(len(trajectories)))
    random.Random(rng.random()).shuffle(order)
    got = at2po([trajectories[place] for place in order])
    for place, row in zip(order, got, strict=True):
        assert row == pytest.approx(expect[place], rel=0, abs=1e-10)


def test_a_child_of_high_entropy_weighs_more_and_one_without_a_reward_nothing():
    leaves = [
        Leaf(prompt=0, entropies=(0.0, 1.0), outcome=1.0),
        Leaf(prompt=0, entropies=(0.0,), outcome=0.0, parent=0, num_shared=1),
        Leaf(prompt=0, entropies=(2.0,), outcome=0.0, parent=0, num_shared=1),
    ]
    trajectories = trajectories_of(leaves)
    got = at2po(trajectories, normalize_by_std=False)
    weights = [math.exp(1.0), math.exp(0.0), math.exp(2.0)]
    expect = (weights[0] * 2 / 3 - (weights[1] + weights[2]) / 3) / sum(weights)
    assert [row[0] for row in got] == pytest.approx([expect] * 3, rel=0, abs=1e-12)
    # The step does not train on the parent, but its branches still share a turn.
    judged = at2po(trajectories[1:], normalize_by_std=False)
    assert [row[0] for row in judged] == [0.0, 0.0]
