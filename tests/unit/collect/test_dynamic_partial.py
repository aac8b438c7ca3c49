"""Partial rollouts with dynamic sampling: which groups a step trains on, drops and carries over."""

import dataclasses
import os
import random
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from a2tgpo.collect.informative import is_informative
from a2tgpo.collect.partial import PartialRollout
from a2tgpo.collect.state import RolloutState
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.rollout import PartialConfig, RolloutConfig
from a2tgpo.data.sampler import PromptSampler
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.parallel.engine_group import ALONE
from a2tgpo.parallel.initialize import initialize, shutdown
from a2tgpo.rollout.counts import RolloutCounts
from a2tgpo.trajectory import Prompt, Trajectory, Turn

NUM_STEPS = 5


@pytest.fixture(scope="module", autouse=True)
def process_group():
    environment = dict(os.environ)
    initialize(ParallelConfig(), seed=0)
    yield
    shutdown()
    os.environ.clear()
    os.environ.update(environment)


class Played:
    """Stands in for `RewardedRollout`. About a share `luck` of the groups ends within a budget, and about a share
    `mixed` of the groups is informative.
    """

    def __init__(self, luck, mixed):
        self._luck, self._mixed = luck, mixed

    def play_on(self, groups, *, budgets, version, counts):
        return [self._played(*each, version) for each in zip(groups, budgets, strict=True)]

    def _played(self, group, budget, version):
        has_ended = budget is None or random.Random(f"{group.key} {version}").random() < self._luck
        is_mixed = random.Random(f"{group.key}").random() < self._mixed
        old = [list(member.turns) for member in group.trajectories] or [[], []]
        members = [
            Trajectory(
                prompt_index=group.prompt.index,
                prompt_id=group.prompt.id,
                sample_index=sample,
                prompt_tokens=[1],
                turns=[*turns, Turn(tokens=[1], rollout_logprobs=[0.0], version=version)],
                stop_reason="answer" if has_ended else "",
                task_reward=float(is_mixed and sample),
                outcome_reward=float(is_mixed and sample),
            )
            for sample, turns in enumerate(old)
        ]
        return dataclasses.replace(group, trajectories=members)


def prompts(indices, positions):
    return [
        Prompt(index=place, id=str(indices[place]), question="?", answers=("a",), tokens=(1,))
        for place in positions
    ]


def config_of(num_groups, extra, staleness, max_draws, *, is_dynamic=True):
    return RolloutConfig(
        prompts_per_step=num_groups,
        group_size=2,
        dynamic_sampling=is_dynamic,
        max_draws=max_draws,
        partial=PartialConfig(tokens_per_step=1, extra_prompts=extra, max_staleness=staleness),
    )


def questions_needed(config):
    per_step = config.max_draws * config.prompts_per_step + config.partial.extra_prompts
    return config.partial.extra_prompts + (config.partial.max_staleness + 1) * per_step


def play(config, state, rollout, step):
    """Return the step's trajectories and metrics."""
    metrics = MetricSums()
    partial = PartialRollout(config, rollout, SimpleNamespace(prompts=prompts), state, ALONE)
    return partial.play(step, RolloutCounts(), metrics), metrics.values()


def groups_of(trajectories):
    """Return the groups of a step, by their places."""
    places = sorted({trajectory.prompt_index for trajectory in trajectories})
    return [[t for t in trajectories if t.prompt_index == place] for place in places]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    num_groups=st.integers(1, 5),
    extra_share=st.floats(0, 1),
    staleness=st.integers(1, 3),
    max_draws=st.integers(1, 4),
    luck=st.floats(0, 1),
    mixed=st.floats(0, 1),
)
def test_a_step_is_full_and_takes_equal_groups_only_after_its_last_draw(
    num_groups, extra_share, staleness, max_draws, luck, mixed
):
    config = config_of(num_groups, round(extra_share * num_groups), staleness, max_draws)
    config.check_questions(questions_needed(config))
    state = RolloutState(sampler=PromptSampler(questions_needed(config), num_groups, seed=1))
    rollout, trained = Played(luck, mixed), set()
    for step in range(NUM_STEPS):
        trajectories, metrics = play(config, state, rollout, step)
        groups = groups_of(trajectories)
        assert len(groups) == num_groups and all(len(group) == 2 for group in groups)
        unfilled = sum(not is_informative(group) for group in groups)
        assert metrics["sampling/unfilled_groups"] == unfilled
        assert metrics["sampling/draws"] <= max_draws
        assert unfilled == 0 or metrics["sampling/draws"] == max_draws
        assert all(member.stop_reason for member in trajectories)
        assert max(member.staleness(step) for member in trajectories) <= staleness
        names = {(group[0].prompt_id, group[0].turns[0].version) for group in groups}
        assert len(names) == num_groups and not names & trained
        trained |= names
        carried = state.carried
        assert len(carried.entries) <= config.partial.extra_prompts
        assert [group.key for group in carried.own] == [entry.key for entry in carried.entries]
        assert all(is_informative(group.trajectories) for group in carried.own if group.is_complete)
        assert unfilled == 0 or not carried.entries, "nothing is left that could fill the step"
        assert len({entry.question for entry in carried.entries}) == len(carried.entries)


def test_a_step_goes_on_from_its_state_as_if_it_had_never_stopped():
    config = config_of(4, 3, 2, 3)
    state = RolloutState(sampler=PromptSampler(questions_needed(config), 4, seed=1))
    rollout = Played(0.4, 0.5)
    for step in range(2):
        play(config, state, rollout, step)
    assert state.carried.entries
    saved = state.snapshot()
    first = [play(config, state, rollout, step) for step in range(2, NUM_STEPS)]
    again = RolloutState(sampler=PromptSampler(questions_needed(config), 4, seed=1))
    again.restore(saved)
    assert [play(config, again, rollout, step) for step in range(2, NUM_STEPS)] == first


def test_dropped_groups_and_draws_are_counted_by_hand():
    config = config_of(4, 2, 1, 3)
    state = RolloutState(sampler=PromptSampler(questions_needed(config), 4, seed=1))
    none_mixed, metrics = play(config, state, Played(1.0, 0.0), 0)
    assert len(groups_of(none_mixed)) == 4 and not state.carried.entries
    # Six groups of the first draw, and four of each further draw, are all dropped, and four of them fill the step.
    assert metrics["sampling/groups_played"] == 6 + 4 + 4 and metrics["sampling/draws"] == 3
    assert metrics["sampling/kept_share"] == 0 and metrics["sampling/unfilled_groups"] == 4
    _, metrics = play(config, state, Played(0.0, 1.0), 1)
    # No group ends within the budget, so the four oldest are played to their end, and the others are carried over.
    assert metrics["sampling/groups_played"] == 4 and metrics["sampling/draws"] == 1
    assert metrics["partial/unbounded_groups"] == 4 and metrics["partial/pool_groups"] == 2


def test_if_all_groups_are_informative_a_step_is_that_of_partial_rollouts_alone():
    steps = []
    for is_dynamic in (True, False):
        config = config_of(4, 3, 2, 3, is_dynamic=is_dynamic)
        state = RolloutState(sampler=PromptSampler(100, 4, seed=1))
        steps.append([play(config, state, Played(0.5, 1.0), step)[0] for step in range(NUM_STEPS)])
    assert steps[0] == steps[1]
