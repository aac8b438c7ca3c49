"""The rollout of a step.

A step plays one draw of prompts. With dynamic sampling, the step draws until informative groups fill it. With partial
rollouts, the step takes complete groups from a larger pool (`collect/partial.py`).

A group is informative if the outcome rewards of its trajectories, before a length penalty, are not all equal (DAPO,
arXiv 2503.14476, Eq. 11): if all are right or all are wrong, only length could be learned. Dynamic sampling drops
the other groups and draws again. The remaining groups are a biased sample of the policy, so metrics cover all groups
and the remaining ones:

    sampling/draws                  draws of the step
    sampling/groups_played          groups of all draws
    sampling/kept_share             share of informative groups among them
    sampling/surplus_groups         informative groups that did not fit into the step
    sampling/unfilled_groups        places of the step filled with uninformative groups
    sampling/reward_all_mean        outcome reward over everything played; reward/mean is over the step's groups
    sampling/format_error_rate_all  as reward/format_error_rate, over everything played
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist

from a2tgpo.collect.partial import PartialRollout
from a2tgpo.lifecycle.process_age import process_age_s
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.parallel.collectives import all_gather_object
from a2tgpo.record.recorder import add_rollout_counts
from a2tgpo.rollout.counts import RolloutCounts
from a2tgpo.rollout.multi_turn import RolloutCutError
from a2tgpo.trajectory import Trajectory

if TYPE_CHECKING:
    from a2tgpo.assemble import RunParts

logger = logging.getLogger(__name__)


class StepRollout:
    """Plays the groups of every step; each rank has one and makes the same calls."""

    def __init__(self, parts: RunParts):
        self._parts = parts
        self._config = parts.config.rollout
        self._partial = PartialRollout(parts)
        self._has_warned = False
        self._startup = dict(parts.startup)
        """Reported with the first rollout; the process's age at the first finished trajectory is added."""

    def play(
        self, *, step: int, metrics: MetricSums, is_cut: Callable[[], bool] | None = None
    ) -> list[Trajectory] | None:
        """Play a step on awake engines with the step's weights; every rank must call this.

        Args:
            step: step of the run, from 0.
            metrics: receives the engine's counts and the `sampling/` or `partial/` metrics; to be reduced over the
                world.
            is_cut: polled for whether to interrupt the rollout; ranks may see it at different times. None: never.

        Returns:
            This replica's share of the step's groups, prompt_index in [0, prompts_per_step); empty on ranks other
            than the first of a replica. None if interrupted on this rank or, with dynamic or partial rollouts, on
            any rank.
        """
        counts = RolloutCounts()
        if self._config.dynamic_sampling:
            trajectories = self._play_until_full(step, counts, metrics, is_cut)
        elif self._config.partial.is_on:
            trajectories = self._partial.play(step, counts, metrics, is_cut, progress=self._note_first)
        else:
            asked = self._parts.sampler.next_indices()
            trajectories = self._play_share(asked, range(len(asked)), step, counts, is_cut)
        if trajectories is None:
            return None
        if not self._parts.replicas.is_first:
            return []
        add_rollout_counts(metrics, counts)
        while self._startup:
            metrics.add_max(*self._startup.popitem())
        return trajectories

    def _play_until_full(
        self, step: int, counts: RolloutCounts, metrics: MetricSums, is_cut: Callable[[], bool] | None
    ) -> list[Trajectory] | None:
        sampler, num_groups = self._parts.sampler, self._config.prompts_per_step
        asked: list[int] = []
        informative: list[bool] = []
        played: list[Trajectory] = []
        draws = 0
        while draws < self._config.max_draws:
            size = draw_size(
                informative,
                num_groups=num_groups,
                num_replicas=self._parts.replicas.count,
                num_left=sampler.num_questions - len(asked),
            )
            if size == 0:
                break
            asked += sampler.next_indices(size, excluded=asked)
            # Positions continue from draw to draw: they identify the step's groups and the seeds of their rollouts.
            drawn = range(len(asked))[-size:]
            trajectories = self._play_share(asked, drawn, step, counts, is_cut)
            found = self._agree_on_informative(drawn, trajectories)
            if found is None or trajectories is None:
                return None
            informative += found
            played += trajectories
            draws += 1
        selection = select_groups(informative, num_groups=num_groups)
        if selection.num_unfilled:
            self._warn_once(step, draws, len(informative), selection.num_unfilled)
        metrics.add("sampling/draws", draws, 1)
        metrics.add("sampling/groups_played", len(informative), 1)
        metrics.add("sampling/kept_share", sum(informative), len(informative))
        metrics.add("sampling/surplus_groups", selection.num_surplus, 1)
        metrics.add("sampling/unfilled_groups", selection.num_unfilled, 1)
        if self._parts.replicas.is_first:
            metrics.add("sampling/reward_all_mean", sum(t.outcome_reward for t in played), len(played))
            metrics.add("sampling/format_error_rate_all", sum(not t.format_ok for t in played), len(played))
        return take_groups(played, selection.groups)

    def _play_share(
        self,
        asked: Sequence[int],
        drawn: range,
        step: int,
        counts: RolloutCounts,
        is_cut: Callable[[], bool] | None,
    ) -> list[Trajectory] | None:
        """Play this replica's share of the questions at positions `drawn` in the list `asked`.

        Returns None if interrupted.
        """
        replicas = self._parts.replicas
        share = drawn[replicas.index :: replicas.count]
        try:
            trajectories, counted = self._parts.rollout.run(
                self._parts.train_prompts.prompts(asked, share),
                seed=self._parts.config.run.seed,
                step=step,
                is_cut=is_cut,
                progress=self._note_first,
            )
        except RolloutCutError:
            return None
        counts.add(counted)
        return trajectories

    def _note_first(self, _finished: int, _all: int) -> None:
        if self._startup:
            self._startup.setdefault("time/startup_to_rollout_s", process_age_s())

    def _agree_on_informative(
        self, drawn: range, trajectories: Sequence[Trajectory] | None
    ) -> list[bool] | None:
        """Return which of the draw's groups are informative, equal on all ranks; gathers one bit per group.

        Returns None if the draw was interrupted on any rank.
        """
        world = dist.group.WORLD
        assert world is not None, "torch.distributed is not initialised"
        mine = None
        if trajectories is not None:
            mine = informative_groups(trajectories) if self._parts.replicas.is_first else {}
        parts = all_gather_object(mine, world)
        if any(part is None for part in parts):
            return None
        merged = {index: bit for part in parts for index, bit in part.items()}
        return [merged[index] for index in drawn]

    def _warn_once(self, step: int, draws: int, num_played: int, num_unfilled: int) -> None:
        if self._parts.groups.rank == 0 and not self._has_warned:
            logger.warning(
                "step %d: after %d draws (rollout.max_draws=%d) and %d of %d questions only %d of %d groups have "
                "rewards that differ; the others have no outcome advantage. Raise rollout.max_draws, or use "
                "questions that are neither too hard nor too easy (logged once; see sampling/unfilled_groups)",
                step + 1,
                draws,
                self._config.max_draws,
                num_played,
                self._parts.sampler.num_questions,
                self._config.prompts_per_step - num_unfilled,
                self._config.prompts_per_step,
            )
        self._has_warned = True


def informative_groups(trajectories: Sequence[Trajectory]) -> dict[int, bool]:
    """Map each prompt index to whether its outcome rewards, before a length penalty, are not all equal."""
    rewards: dict[int, set[float | None]] = {}
    for trajectory in trajectories:
        # All ill-formed responses earn the same reward, with any answer.
        reward = trajectory.exact_match if trajectory.format_ok else None
        rewards.setdefault(trajectory.prompt_index, set()).add(reward)
    return {index: len(values) > 1 for index, values in rewards.items()}


def draw_size(informative: Sequence[bool], *, num_groups: int, num_replicas: int, num_left: int) -> int:
    """Return how many prompts to draw next to fill the step, judging by the share of informative groups so far.

    Args:
        informative: for every group played, in draw order; empty before the first draw, which takes `num_groups`.
        num_groups: groups of a step; no draw is larger.
        num_replicas: engine replicas; all get equally many prompts while the set lasts.
        num_left: questions that the step has not drawn yet.

    Returns:
        0 if the step is full or all questions were drawn.
    """
    kept = sum(informative)
    missing = max(num_groups - kept, 0)
    wanted = math.ceil(missing * len(informative) / kept) if kept else num_groups
    return min(math.ceil(wanted / num_replicas) * num_replicas, num_groups, num_left)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The groups that a step trains on."""

    groups: list[int]
    """Positions of the step's groups among all groups played, ascending, thus in draw order."""
    num_surplus: int
    """Informative groups that were left out."""
    num_unfilled: int
    """Uninformative groups that were taken."""


def select_groups(informative: Sequence[bool], *, num_groups: int) -> Selection:
    """Select the first `num_groups` informative groups, filled up with the first of the other groups.

    Args:
        informative: for every group played, in draw order; at least `num_groups` long.
    """
    kept = [position for position, is_informative in enumerate(informative) if is_informative]
    dropped = [position for position, is_informative in enumerate(informative) if not is_informative]
    filling = dropped[: max(num_groups - len(kept), 0)]
    return Selection(
        groups=sorted(kept[:num_groups] + filling),
        num_surplus=max(len(kept) - num_groups, 0),
        num_unfilled=len(filling),
    )


def take_groups(trajectories: Sequence[Trajectory], groups: Sequence[int]) -> list[Trajectory]:
    """Return the trajectories whose prompt_index is in `groups`, renumbered by its position there."""
    places = {group: place for place, group in enumerate(groups)}
    return [
        dataclasses.replace(trajectory, prompt_index=places[trajectory.prompt_index])
        for trajectory in trajectories
        if trajectory.prompt_index in places
    ]
