import math
import subprocess
import sys
from statistics import fmean, stdev

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from a2tgpo.advantage import turn_table
from a2tgpo.advantage.anchor_state import NO_STATE, turn_states
from a2tgpo.advantage.estimator import compute_advantages
from a2tgpo.advantage.turn_table import build_turn_table
from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.trajectory import Call, Trajectory, Turn

MAX_TURNS = 3
rollouts = st.lists(
    st.tuples(
        st.integers(0, 2),
        # few queries and observations, so that rollouts reach equal states
        st.lists(st.tuples(st.sampled_from(["a", "b"]), st.sampled_from([(1,), (1, 2)])), max_size=MAX_TURNS),
        st.sampled_from([-1.0, 0.0, 0.4, 1.0]),
        st.booleans(),
    ),
    max_size=12,
)
configs = st.builds(
    AlgorithmConfig,
    advantage=st.just("gigpo"),
    gamma=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    alpha=st.sampled_from([0.0, 0.3, 1.0]),
    normalize_by_std=st.booleans(),
)


def make_trajectory(prompt: int, searches, outcome: float = 0.0, final: bool = True) -> Trajectory:
    turns = [
        Turn(
            tokens=[1],
            rollout_logprobs=[0.0],
            calls=[Call(tool="search", arguments=query)],
            observation_tokens=list(tokens),
        )
        for query, tokens in searches
    ]
    turns += [Turn(tokens=[2], rollout_logprobs=[0.0])] * (final or not turns)
    return Trajectory(
        prompt_index=prompt,
        prompt_id=str(prompt),
        sample_index=0,
        prompt_tokens=[0],
        turns=turns,
        stop_reason="answer",
        outcome_reward=outcome,
    )


def gigpo(items, config: AlgorithmConfig) -> torch.Tensor:
    trajectories = [make_trajectory(*item) for item in items]
    table = build_turn_table(trajectories, num_prompts=3, max_turns=MAX_TURNS)
    return compute_advantages(table, config, dp_group=None).advantages


def z_score(value: float, group: list[float], by_std: bool) -> float:
    deviation = value - fmean(group)
    return deviation / (stdev(group) + 1e-6) if by_std else deviation


def reference(items, config: AlgorithmConfig) -> list[list[float]]:
    """Return the result of Eq. 3 and 5-8 of arXiv:2505.10978, computed with loops, with the states themselves as
    keys.
    """
    states, returns = [], []
    for prompt, searches, outcome, final in items:
        num_turns = len(searches) + (final or not searches)
        states.append([(prompt, "start"), *((prompt, search) for search in searches)][:num_turns])
        returns.append([config.gamma ** (num_turns - 1 - t) * outcome for t in range(num_turns)])
    advantages = []
    for i, (prompt, _, outcome, _) in enumerate(items):
        siblings = [item[2] for item in items if item[0] == prompt]
        episode = outcome / (1 + 1e-6) if config.normalize_by_std else outcome
        if len(siblings) > 1:
            episode = z_score(outcome, siblings, config.normalize_by_std)
        row = []
        for t, state in enumerate(states[i]):
            group = [returns[j][k] for j in range(len(items)) for k, s in enumerate(states[j]) if s == state]
            step = z_score(returns[i][t], group, config.normalize_by_std) if len(group) > 1 else 0.0
            row.append(episode + config.alpha * step)
        advantages.append(row)
    return advantages


@given(rollouts, configs)
def test_advantages_equal_the_plain_loops(items, config):
    result = gigpo(items, config)
    assert result.shape == (len(items), MAX_TURNS + 1)
    for row, expect in zip(result.tolist(), reference(items, config), strict=True):
        np.testing.assert_allclose(row[: len(expect)], expect, rtol=0, atol=1e-9)


@given(rollouts, st.sampled_from([0.5, 0.95]))
def test_without_its_step_part_it_is_grpo(items, gamma):
    config = AlgorithmConfig(advantage="gigpo", gamma=gamma, alpha=0.0)
    table = build_turn_table([make_trajectory(*item) for item in items], num_prompts=3, max_turns=MAX_TURNS)
    grpo = compute_advantages(table, AlgorithmConfig(advantage="grpo"), dp_group=None)
    assert torch.equal(compute_advantages(table, config, dp_group=None).advantages, grpo.advantages)


def test_turns_of_equal_state_are_compared_across_rollouts_and_across_turns():
    found, lost = ("who", (5,)), ("what", (6,))
    # two rollouts reach `found`, one of them by a detour, and have different outcomes
    items = [(0, [found], 1.0, True), (0, [lost, found], 0.0, True)]
    config = AlgorithmConfig(advantage="gigpo", gamma=0.5, alpha=1.0)
    step = gigpo(items, config) - gigpo(items, AlgorithmConfig(advantage="gigpo", gamma=0.5, alpha=0.0))
    up = math.sqrt(0.5)
    # turn 1: 0.5 against 0; `lost` is alone; `found`: 1 against 0
    np.testing.assert_allclose(step.tolist(), [[up, up, 0, 0], [-up, 0, -up, 0]], atol=1e-5)


def test_gains_do_not_move_it_and_the_clip_stays_fixed():
    trajectories = [
        make_trajectory(0, [("a", (1,))], 1.0),
        make_trajectory(0, [("a", (1,))], 0.0),
    ]
    for trajectory, gain in zip(trajectories, (0.1, 0.9), strict=True):
        trajectory.turns[0].info_gain = gain
    config = AlgorithmConfig(advantage="gigpo")
    table = build_turn_table(trajectories, num_prompts=1, max_turns=1)
    result = compute_advantages(table, config, dp_group=None)
    assert result.normalized_gain.abs().max() == 0.0
    assert torch.equal(
        result.advantages,
        gigpo([(0, [("a", (1,))], 1.0, True), (0, [("a", (1,))], 0.0, True)], config)[:, :2],
    )


def test_states_are_equal_exactly_where_the_environment_shows_the_same():
    start, after = turn_states(make_trajectory(4, [("Who  wrote it ", (5, 6))]))
    assert turn_states(make_trajectory(4, [("x", (1,)), ("who wrote\tIT", (5, 6))]))[2] == after
    others = [
        start,
        *turn_states(make_trajectory(5, [("Who wrote it", (5, 6))])),
        turn_states(make_trajectory(4, [("Who wrote it", (5,))]))[1],
        turn_states(make_trajectory(4, [("Who wrote that", (5, 6))]))[1],
        turn_states(make_trajectory(4, [("", ())]))[1],
    ]
    assert len({after, *others}) == len(others) + 1
    assert all(0 <= key < 2**63 for key in others)


def test_a_turn_that_was_not_written_has_no_state():
    cut = make_trajectory(0, [("a", (1,)), ("b", (2,))], final=False)
    table = build_turn_table([cut, make_trajectory(0, [])], num_prompts=1, max_turns=3)
    assert (table.state != NO_STATE).tolist() == [[True, True, False, False], [True, False, False, False]]


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_states_are_equal_in_every_process(hash_seed):
    code = (
        "from a2tgpo.advantage.anchor_state import turn_states; from a2tgpo.trajectory import *;"
        "calls = [Call(tool='search', arguments='caf\\u00e9')];"
        "turn = Turn(tokens=[1], rollout_logprobs=[0.0], calls=calls, observation_tokens=[7]);"
        "it = {'prompt_index': 3, 'prompt_id': '', 'sample_index': 0, 'prompt_tokens': [], 'stop_reason': ''};"
        "print(turn_states(Trajectory(turns=[turn] * 2, **it)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    mine = turn_states(make_trajectory(3, [("caf\u00e9", (7,))] * 2, final=False))
    assert result.stdout.strip() == str(mine)


@pytest.mark.parametrize(("advantage", "hashed"), [("gigpo", 2), ("turn_group", 0), ("grpo", 0)])
def test_states_are_hashed_for_a_method_that_compares_them_only(monkeypatch, advantage, hashed):
    calls = []
    monkeypatch.setattr(turn_table, "turn_states", lambda t: calls.append(t) or turn_states(t))
    trajectories = [make_trajectory(0, [("who", (5, 6))]), make_trajectory(0, [])]
    table = build_turn_table(trajectories, num_prompts=1, max_turns=2)
    compute_advantages(table, AlgorithmConfig(advantage=advantage), dp_group=None)
    assert len(calls) == hashed
