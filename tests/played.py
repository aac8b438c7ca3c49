"""Play prompts with rewards and gains, as a training step does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from a2tgpo.collect.rewarded_rollout import RewardedRollout
from a2tgpo.reward.score import TrajectoryReward
from a2tgpo.rollout.carried_group import CarriedGroup
from a2tgpo.rollout.counts import RolloutCounts
from a2tgpo.rollout.group_rollout import GroupRollout
from a2tgpo.trajectory import Prompt, Trajectory


def run(
    rollout: GroupRollout,
    prompts: Sequence[Prompt],
    *,
    seed: int = 0,
    version: int = 0,
    measure: str = "probability",
    should_stop: Callable[[], bool] | None = None,
    **settings: Any,
) -> tuple[list[Trajectory], RolloutCounts]:
    """The scored trajectories by prompt and sample, and the counts; `settings` are those of `GroupRollout.play`."""
    counts = RolloutCounts()
    reward = TrajectoryReward(measure=measure, tools=rollout.tool_names)
    playing = rollout.play(prompts, seed=seed, version=version, counts=counts, **settings)
    trajectories = []
    for done in rollout.finished(playing, should_stop=should_stop):
        reward.score(done.trajectory, done.turn_texts, done.prompt.answers, done.context_logprobs)
        trajectories.append(done.trajectory)
    return sorted(trajectories, key=lambda t: (t.prompt_index, t.sample_index)), counts


def run_on(
    rollout: GroupRollout, groups: Sequence[CarriedGroup], *, budgets: Sequence[int | None], version: int
) -> tuple[list[CarriedGroup], RolloutCounts]:
    """The groups played on, and the counts."""
    counts = RolloutCounts()
    return rewarded(rollout).play_on(groups, budgets=budgets, version=version, counts=counts), counts


def rewarded(rollout: GroupRollout, *, should_stop: Callable[[], bool] | None = None) -> RewardedRollout:
    reward = TrajectoryReward(measure="probability", tools=rollout.tool_names)
    return RewardedRollout(rollout, reward, seed=0, should_stop=should_stop)
