"""Play prompts with rewards and gains, as a training step does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from scored import EM
from scripted_engine import ScriptedEngine
from scripted_search import ScriptedSearch, toolset_of
from transformers import PreTrainedTokenizerBase

from a2tgpo.collect.rewarded_rollout import RewardedRollout
from a2tgpo.config.reward import RewardConfig
from a2tgpo.config.rollout import GainConfig, RolloutConfig
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


def prompts_of(tokenizer: PreTrainedTokenizerBase, count: int, *, question: str = "Which?") -> list[Prompt]:
    """Return `count` prompts, whose text is `question`."""
    tokens = tuple(tokenizer(question)["input_ids"])
    return [
        Prompt(index=index, id=f"q{index}", question=question, answers=("Rome",), tokens=tokens)
        for index in range(count)
    ]


@contextlib.contextmanager
def rollouts_of(
    engine_of: Callable[[PreTrainedTokenizerBase], ScriptedEngine],
    tokenizer: PreTrainedTokenizerBase,
    **defaults: Any,
) -> Iterator[Callable[..., GroupRollout]]:
    """Yield a function that opens a rollout on an engine of its own, and close all its rollouts at the end.

    The function takes settings of `RolloutConfig`, which override `defaults`, and:

        search: the search client. By default it knows every query.
        more_tools: other tools, by name.
    """
    with contextlib.ExitStack() as stack:

        def open_rollout(*, search: Any = None, more_tools: Any = None, **settings: Any) -> GroupRollout:
            rollout = GroupRollout(
                engine_of(tokenizer),
                toolset_of(search or ScriptedSearch(), more_tools=more_tools),
                tags(tokenizer, "search", *(more_tools or {})),
                rollout=RolloutConfig(**{**defaults, **settings}),
            )
            stack.callback(rollout.close)
            return rollout

        yield open_rollout


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
