"""Play prompts with rewards and gains, as a training step does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from scored import EM
from transformers import PreTrainedTokenizerBase

from a2tgpo.collect.rewarded_rollout import RewardedRollout
from a2tgpo.config.reward import RewardConfig
from a2tgpo.config.rollout import GainConfig
from a2tgpo.data.template import PromptTemplate
from a2tgpo.protocol.tags import TagProtocol
from a2tgpo.reward.episode import reader_of
from a2tgpo.reward.pool import RewardPool
from a2tgpo.reward.score import TrajectoryReward
from a2tgpo.reward.total import judge
from a2tgpo.rollout.carried_group import CarriedGroup
from a2tgpo.rollout.counts import RolloutCounts
from a2tgpo.rollout.group_rollout import GroupRollout
from a2tgpo.trajectory import Prompt, Trajectory


def tags(
    tokenizer: PreTrainedTokenizerBase, *tools: str, gain: GainConfig | None = None, **settings: Any
) -> TagProtocol:
    """Return the tag protocol with the tools `tools`, or with search alone. `settings` are those of `TagProtocol`."""
    template, scaffold = PromptTemplate(tokenizer, ""), (gain or GainConfig()).scaffold
    return TagProtocol(template, tools=tools or ("search",), scaffold=scaffold, **settings)


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
    """Return the scored trajectories by prompt and sample, and the counts. `settings` are those of
    `GroupRollout.play`.
    """
    counts = RolloutCounts()
    reward = TrajectoryReward(measure=measure, reader=reader_of(rollout.protocol))
    playing = rollout.play(prompts, seed=seed, version=version, counts=counts, **settings)
    trajectories = []
    for done in rollout.finished(playing, should_stop=should_stop):
        episode = reward.begin(done.trajectory, done.prompt, done.turn_texts, done.context_logprobs)
        reward.finish(done.trajectory, judge(EM, episode, format_gate=True))
        trajectories.append(done.trajectory)
    return sorted(trajectories, key=lambda t: (t.prompt_index, t.sample_index)), counts


def run_on(
    rollout: GroupRollout, groups: Sequence[CarriedGroup], *, budgets: Sequence[int | None], version: int
) -> tuple[list[CarriedGroup], RolloutCounts]:
    """Continue the groups, and return them and the counts."""
    counts = RolloutCounts()
    return rewarded(rollout).play_on(groups, budgets=budgets, version=version, counts=counts), counts


def rewarded(rollout: GroupRollout, *, should_stop: Callable[[], bool] | None = None) -> RewardedRollout:
    reward, pool = (
        TrajectoryReward(reader=reader_of(rollout.protocol)),
        RewardPool(EM, RewardConfig(num_workers=1)),
    )
    return RewardedRollout(rollout, reward, pool, seed=0, should_stop=should_stop)
