"""Which groups a step with dynamic sampling takes, and how many prompts it draws."""

import math
import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2tgpo.collect.informative import draw_size, informative_groups
from a2tgpo.collect.state import RolloutState
from a2tgpo.collect.step import StepRollout, select_groups, take_groups
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.rollout import RolloutConfig
from a2tgpo.data.sampler import PromptSampler
from a2tgpo.parallel.engine_group import ALONE
from a2tgpo.parallel.initialize import initialize, shutdown
from a2tgpo.rollout.counts import RolloutCounts
from a2tgpo.trajectory import Prompt, Trajectory


def trajectory(group: int, sample: int, reward: float = 0.0) -> Trajectory:
    return Trajectory(
        prompt_index=group,
        prompt_id=f"question {group}",
        sample_index=sample,
        prompt_tokens=[1],
        turns=[],
        stop_reason="answer",
        outcome_reward=reward,
        task_reward=reward,
        exact_match=max(reward, 0.0),
        format_ok=reward >= 0,
    )


@st.composite
def played(draw) -> tuple[list[bool], int]:
    """Return (informative, num_groups) with at least num_groups groups."""
    num_groups = draw(st.integers(1, 12))
    return draw(st.lists(st.booleans(), min_size=num_groups, max_size=40)), num_groups


@given(played())
def test_a_step_is_the_first_informative_groups_in_draw_order(case):
    informative, num_groups = case
    groups = select_groups(informative, num_groups=num_groups).groups
    assert groups == sorted(set(groups)) and len(groups) == num_groups
    positions = [i for i, bit in enumerate(informative) if bit]
    assert [group for group in groups if informative[group]] == positions[:num_groups]


@given(played())
def test_missing_places_go_to_the_first_dropped_groups_and_leftovers_are_counted(case):
    informative, num_groups = case
    selection = select_groups(informative, num_groups=num_groups)
    filling = [group for group in selection.groups if not informative[group]]
    assert filling == [i for i, bit in enumerate(informative) if not bit][: len(filling)]
    assert len(filling) == selection.num_unfilled == max(0, num_groups - sum(informative))
    assert selection.num_surplus == sum(informative) - sum(informative[g] for g in selection.groups)
    assert selection.num_surplus == 0 or selection.num_unfilled == 0


@given(played(), st.randoms())
def test_taken_groups_are_numbered_from_0_in_draw_order_and_stay_whole(case, random):
    informative, num_groups = case
    groups = select_groups(informative, num_groups=num_groups).groups
    everything = [trajectory(group, sample) for group in range(len(informative)) for sample in range(3)]
    random.shuffle(everything)  # replicas have them in another order
    taken = sorted(take_groups(everything, groups), key=lambda t: (t.prompt_index, t.sample_index))
    found = [(t.prompt_index, t.sample_index, t.prompt_id) for t in taken]
    assert found == [
        (place, sample, f"question {group}") for place, group in enumerate(groups) for sample in range(3)
    ]


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 4), st.integers(1, 4), st.integers(0, 60))
def test_a_draw_ends_the_step_or_gives_all_replicas_as_much(informative, replicas, per_replica, num_left):
    num_groups = replicas * per_replica
    size = draw_size(informative, num_groups=num_groups, num_engines=replicas, num_left=num_left)
    kept = sum(informative)
    if kept >= num_groups or num_left == 0:
        assert size == 0
        return
    assert 1 <= size <= min(num_groups, num_left)
    assert size % replicas == 0 or size == num_left
    # The draw fills the step if the share kept so far stays the same, unless a bound prevents it.
    if kept:
        needed = (num_groups - kept) * len(informative) / kept
        assert size >= min(needed, num_groups, num_left)
        assert size <= math.ceil(needed) + replicas - 1


@pytest.mark.parametrize(
    ("informative", "num_left", "size"),
    [
        ([], 100, 16),  # the first draw is a whole step
        (
            [True] * 12 + [False] * 4,
            100,
            8,
        ),  # 4 are missing and 3 of 4 are kept: 5.3, rounded up for 4 replicas
        (
            [True] * 2 + [False] * 14,
            100,
            16,
        ),  # 14 are missing and 1 of 8 is kept, but no draw is larger than a step
        ([False] * 16, 100, 16),
        ([True] * 15 + [False], 3, 3),  # the rest of the set
        ([True] * 16, 100, 0),
        ([True] * 20, 100, 0),
    ],
)
def test_draw_sizes_by_hand(informative, num_left, size):
    assert draw_size(informative, num_groups=16, num_engines=4, num_left=num_left) == size


def test_a_group_is_informative_unless_all_its_rewards_are_equal():
    rewards = {0: (1.0, 1.0, 1.0), 3: (-1.0, 0.0, -1.0), 4: (0.0,), 7: (1.0, 0.75)}
    trajectories = [trajectory(g, s, r) for s in range(3) for g in rewards for r in rewards[g][s : s + 1]]
    assert informative_groups(trajectories) == {0: False, 3: True, 4: False, 7: True}
    assert informative_groups([]) == {}


def test_a_length_penalty_makes_no_group_informative():
    trajectories = [trajectory(0, sample, reward) for sample, reward in enumerate((-1.0, -1.0, -1.0))]
    trajectories[1].outcome_reward -= 0.25
    assert informative_groups(trajectories) == {0: False}


def test_a_trajectory_without_a_verdict_makes_no_group_informative():
    trajectories = [trajectory(0, sample, reward) for sample, reward in enumerate((1.0, 0.0, 1.0))]
    assert informative_groups(trajectories) == {0: True}
    trajectories[1].reward_error = "judge: no verdict"
    assert informative_groups(trajectories) == {0: False}
    assert informative_groups(trajectories[1:2]) == {0: False}


def test_any_reward_that_differs_makes_a_group_informative():
    trajectories = [trajectory(0, sample, reward) for sample, reward in enumerate((0.5, 0.25))]
    for each in trajectories:
        each.exact_match, each.format_ok = 0.0, True
    assert informative_groups(trajectories) == {0: True}


class ScriptedRollout:
    """Stands in for prompts and rollout.

    All answers to questions 0 and 1 are ill-formed. Half of the answers to questions 2 and 3 are right.
    """

    first_finished_s = 7.0

    def prompts(self, questions, positions) -> list[Prompt]:
        return [
            Prompt(index=index, id=str(questions[index]), question="", answers=("a",), tokens=(1,))
            for index in positions
        ]

    def play(self, prompts, *, version: int, counts: RolloutCounts, queue) -> list[Trajectory]:
        played = []
        for prompt in prompts:
            for sample in range(2):
                made = trajectory(prompt.index, sample, -1.0)
                if int(prompt.id) > 1:
                    made.outcome_reward = made.task_reward = made.exact_match = float(sample)
                    made.format_ok = True
                played.append(made)
        return played


def test_reward_and_format_are_reported_over_everything_played():
    environment = dict(os.environ)
    scripted: Any = ScriptedRollout()
    config = RolloutConfig(prompts_per_step=2, group_size=2, dynamic_sampling=True, max_draws=3)
    state = RolloutState(sampler=PromptSampler(4, 2, seed=0))
    initialize(ParallelConfig(), seed=0)
    try:
        rollout = StepRollout(
            config, scripted, scripted, state, ALONE, startup={"time/startup_engine_s": 3.0}
        )
        played = rollout.play(version=0)
        later = rollout.play(version=1)
    finally:
        shutdown()
        os.environ.clear()
        os.environ.update(environment)
    assert played is not None and later is not None
    taken, found = played.trajectories, played.metrics.values()
    assert len(taken) == 4 and all(t.format_ok for t in taken) and found["sampling/groups_played"] == 4
    assert found["sampling/format_error_rate_all"] == 0.5
    assert found["sampling/reward_all_mean"] == -0.25
    # Startup times are reported only with the first step's rollout.
    assert (found["time/startup_engine_s"], found["time/startup_to_rollout_s"]) == (3.0, 7.0)
    assert not [name for name in later.metrics.values() if name.startswith("time/startup")]
