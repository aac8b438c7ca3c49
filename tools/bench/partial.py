"""Count the engine steps of a training step with partial rollouts, and how many of them have few busy slots.

The bench measures no time. It simulates a rollout in which each busy slot samples one token per engine step, tools
answer at once, and scoring and prefill take no steps. The trainer's own code (`collect/partial.py`) chooses the
groups to play and to train on, and sets the seeds that determine the lengths of turns. One engine plays 16 groups
of 16 trajectories in 256 slots. Each trajectory has up to six searches.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import measure
from lengths import planned_turn

from a2tgpo.collect.partial import PartialRollout
from a2tgpo.collect.state import RolloutState
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.rollout import PartialConfig, RolloutConfig
from a2tgpo.data.sampler import PromptSampler
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.parallel.engine_group import ALONE
from a2tgpo.parallel.initialize import initialize, shutdown
from a2tgpo.rollout.carried_group import CarriedGroup, copied
from a2tgpo.rollout.counts import RolloutCounts
from a2tgpo.rollout.multi_turn import PromptGroup, Sampling
from a2tgpo.trajectory import LogProbs, Prompt, TokenIds, Trajectory, Turn

GROUPS, GROUP_SIZE, SLOTS = 16, 16, 256
MEDIAN, LONGEST, CALL_SHARE, MAX_TURNS = 110, 400, 0.75, 6
STEPS = 40
FEW = SLOTS // 4
WHOLE = PartialConfig(tokens_per_step=10**9)
VARIANTS = (
    PartialConfig(tokens_per_step=600, extra_prompts=16, max_staleness=2),
    PartialConfig(tokens_per_step=800, extra_prompts=16, max_staleness=2),
    PartialConfig(tokens_per_step=1000, extra_prompts=8, max_staleness=2),
    PartialConfig(tokens_per_step=600, extra_prompts=4, max_staleness=2),
)


class CountedRollout:
    """A simulated rollout, which gives slots to trajectories of planned lengths and counts engine steps."""

    def __init__(self) -> None:
        self.steps_by_busy: Counter[int] = Counter()
        """{number of busy slots: number of engine steps}."""

    def play_on(
        self, groups: Sequence[CarriedGroup], *, budgets: Sequence[int | None], version: int, **_: Any
    ) -> list[CarriedGroup]:
        sampling = Sampling(temperature=1.0, top_p=1.0, seed=0, version=version)
        played, waiting = [], []
        for group, budget in zip(groups, budgets, strict=True):
            members = [copied(member) for member in group.trajectories or _begin(group.prompt)]
            shared = PromptGroup(prompt=group.prompt, aliases=[], begun=group.begun)
            waiting += [
                self._time_of(member, shared, budget, sampling)
                for member in members
                if not member.stop_reason
            ]
            played.append(dataclasses.replace(group, trajectories=members))
        self._count(waiting)
        return played

    def _time_of(
        self, trajectory: Trajectory, group: PromptGroup, budget: int | None, sampling: Sampling
    ) -> int:
        """Continue the trajectory until it ends or uses up its budget. Return the number of engine steps."""
        sampled = 0
        while not trajectory.stop_reason and (budget is None or sampled < budget):
            turn_seed = sampling.turn_seed(group, trajectory.sample_index, len(trajectory.turns))
            assert turn_seed is not None, "this is no greedy rollout"
            length, calls = planned_turn(turn_seed, median=MEDIAN, longest=LONGEST, call_share=CALL_SHARE)
            trajectory.turns.append(
                Turn(tokens=TokenIds([0] * length), rollout_logprobs=LogProbs(), version=sampling.version)
            )
            sampled += length
            if not calls or len(trajectory.turns) > MAX_TURNS:
                trajectory.stop_reason = "answer"
        return sampled

    def _count(self, waiting: list[int]) -> None:
        running: list[int] = []
        waiting = waiting[::-1]
        while running or waiting:
            while waiting and len(running) < SLOTS:
                running.append(waiting.pop())
            until_next = min(running)
            self.steps_by_busy[len(running)] += until_next
            running = [left - until_next for left in running if left > until_next]


def _begin(prompt: Prompt) -> list[Trajectory]:
    return [
        Trajectory(
            prompt_index=prompt.index,
            prompt_id=prompt.id,
            sample_index=sample,
            prompt_tokens=TokenIds(),
            turns=[],
            stop_reason="",
        )
        for sample in range(GROUP_SIZE)
    ]


def _prompts(indices: Sequence[int], positions: Sequence[int]) -> list[Prompt]:
    return [
        Prompt(index=place, id=str(indices[place]), question="", answers=("a",), tokens=())
        for place in positions
    ]


def count(partial: PartialConfig) -> tuple[float, float]:
    """Return the mean number of engine steps per training step, and how many of them have less than 1/4 of the slots
    busy."""
    rollout = CountedRollout()
    config = RolloutConfig(prompts_per_step=GROUPS, group_size=GROUP_SIZE, partial=partial)
    state = RolloutState(sampler=PromptSampler(2 * GROUPS * STEPS, GROUPS, seed=0))
    prompts: Any = SimpleNamespace(prompts=_prompts)
    played = PartialRollout(config, cast(Any, rollout), prompts, state, ALONE)
    for step in range(STEPS):
        played.play(step, RolloutCounts(), MetricSums())
    few = sum(steps for busy, steps in rollout.steps_by_busy.items() if busy < FEW)
    return rollout.steps_by_busy.total() / STEPS, few / STEPS


def rows() -> list[measure.Row]:
    initialize(ParallelConfig(), seed=0)
    whole, whole_few = count(WHOLE)
    found = []
    for partial in VARIANTS:
        settings = f"tokens_per_step {partial.tokens_per_step}, extra_prompts {partial.extra_prompts}"
        ours, few = count(partial)
        for name, value, baseline in (
            ("engine steps of a training step", ours, whole),
            ("of them with under a quarter of the slots busy", few, whole_few),
        ):
            found.append(
                measure.compared(
                    f"{name}, {settings} of {GROUPS} prompts",
                    [value],
                    [baseline],
                    baseline_is="rollouts that end within their step",
                    unit="steps",
                    ratio_is="ours / baseline",
                )
            )
    shutdown()
    return found
