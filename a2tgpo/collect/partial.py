"""Play a step without waiting for its longest trajectories (`rollout.partial`).

A step plays `prompts_per_step` + `extra_prompts` groups. Some groups are carried over from the previous step. The
others begin with new prompts. A trajectory pauses after the turn in which it reaches `tokens_per_step` sampled tokens
in the step. Kimi k1.5 (arXiv 2501.12599) pauses inside a response instead. The step trains on the oldest complete
groups. All other groups are carried over to the next step.

If too few groups are complete, the step plays the oldest unfinished groups to their end. The step also plays a group
to its end if the group would be too stale for a later step. While the settings stay the same, no group is dropped.

The staleness of a trajectory is the number of steps since its oldest turn was played. A step records these metrics:

    partial/carried_trajectories  counts the unfinished trajectories that continue in the next step.
    partial/carried_tokens        counts the sampled tokens in these trajectories.
    partial/pool_groups           counts the complete and unfinished groups that are left for later steps.
    partial/unbounded_groups      counts the unfinished groups that the step continued without a token budget.
    partial/staleness_mean        is the mean staleness of the step's trajectories.
    partial/staleness_max         is the largest staleness of the step's trajectories.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from a2tgpo.collect.carried_pool import (
    Carried,
    Entry,
    engines_for,
    is_due,
    select,
    to_finish,
    trajectories_of,
    with_complete,
)
from a2tgpo.collect.rewarded_rollout import RewardedRollout
from a2tgpo.collect.state import RolloutState
from a2tgpo.config.rollout import RolloutConfig
from a2tgpo.data.template import PromptSet
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.parallel.collectives import all_gather_object, world_group
from a2tgpo.parallel.engine_group import EngineGroup
from a2tgpo.rollout.carried_group import CarriedGroup
from a2tgpo.rollout.counts import RolloutCounts
from a2tgpo.rollout.group_rollout import RolloutInterruptedError
from a2tgpo.trajectory import Trajectory


class PartialRollout:
    """Play the steps of a run with `rollout.partial`. Every rank must make the same calls."""

    def __init__(
        self,
        config: RolloutConfig,
        rollout: RewardedRollout,
        prompts: PromptSet,
        state: RolloutState,
        engine_group: EngineGroup,
    ):
        self._num_groups = config.prompts_per_step
        self._config = config.partial
        self._rollout = rollout
        self._prompts = prompts
        self._state = state
        self._engine_group = engine_group

    def play(self, version: int, counts: RolloutCounts, metrics: MetricSums) -> list[Trajectory] | None:
        """Play a step, update the carried groups, and return this engine's trajectories of the step's groups.

        Return None if any rank interrupted the rollout. The caller must then restore the state before its next use.
        """
        entries, own = self._in_play(version)
        due = {
            entry.key for entry in entries if is_due(entry, version, max_staleness=self._config.max_staleness)
        }
        num_unbounded = sum(not entry.is_complete for entry in entries if entry.key in due)
        played = self._play(own, counts, version=version, unbounded=due)
        complete = self._agree_on_complete(played)
        if complete is None or played is None:
            return None
        entries = with_complete(entries, complete)
        late = {entry.key for entry in to_finish(entries, num_groups=self._num_groups)}
        if late:
            chosen = [group for group in played if group.key in late]
            finished = self._play(chosen, counts, version=version, unbounded=late)
            complete = self._agree_on_complete(finished)
            if complete is None or finished is None:
                return None
            played = [group for group in played if group.key not in late] + finished
            entries = with_complete(entries, complete)
        taken, left = select(entries, num_groups=self._num_groups)
        keys = {entry.key for entry in left}
        carried = Carried(entries=tuple(left), own=_by_age(group for group in played if group.key in keys))
        self._state.carried = carried
        trajectories = trajectories_of(played, taken)
        metrics.add("partial/unbounded_groups", num_unbounded + len(late), 1)
        metrics.add("partial/pool_groups", len(left), 1)
        if self._engine_group.is_leader:
            _add_metrics(metrics, carried.own, trajectories, version)
        return trajectories

    def _in_play(self, version: int) -> tuple[list[Entry], list[CarriedGroup]]:
        """Draw the step's new prompts. Return the entries of all groups in the step, and this engine's groups."""
        carried, engines = self._state.carried, self._engine_group
        missing = self._num_groups + self._config.extra_prompts - len(carried.entries)
        assert missing >= self._num_groups, "no more than extra_prompts groups are carried over"
        questions = self._state.sampler.next_indices(
            missing, excluded=[entry.question for entry in carried.entries]
        )
        owners = engines_for(carried.entries, missing, num_engines=engines.count)
        entries = [
            *carried.entries,
            *(
                Entry(begun=version, index=index, question=question, engine=owner)
                for index, (question, owner) in enumerate(zip(questions, owners, strict=True))
            ),
        ]
        mine = [index for index, owner in enumerate(owners) if owner == engines.index]
        begun = [
            CarriedGroup(begun=version, question=questions[prompt.index], prompt=prompt)
            for prompt in self._prompts.prompts(questions, mine)
        ]
        return entries, [*carried.own, *begun]

    def _play(
        self,
        groups: Sequence[CarriedGroup],
        counts: RolloutCounts,
        *,
        version: int,
        unbounded: Collection[tuple[int, int]],
    ) -> list[CarriedGroup] | None:
        """Continue `groups` within the token budget, and return them. Return None if the rollout was interrupted.

        Groups whose key is in `unbounded` are played to their end.
        """
        budget = self._config.tokens_per_step
        unfinished = [group for group in groups if not group.is_complete]
        budgets = [None if group.key in unbounded else budget for group in unfinished]
        try:
            played = self._rollout.play_on(unfinished, budgets=budgets, version=version, counts=counts)
        except RolloutInterruptedError:
            return None
        return [group for group in groups if group.is_complete] + played

    def _agree_on_complete(self, groups: Sequence[CarriedGroup] | None) -> set[tuple[int, int]] | None:
        """Return the keys of all engines' complete groups, or None if any rank interrupted its rollout."""
        world = world_group()
        mine = None if groups is None else [group.key for group in groups if group.is_complete]
        parts = all_gather_object(mine, world)
        if any(part is None for part in parts):
            return None
        return {key for part in parts for key in part}


def _by_age(groups: Iterable[CarriedGroup]) -> tuple[CarriedGroup, ...]:
    """Return `groups`, the oldest first, as `read` does. A resumed run thus plays in the same order."""
    return tuple(sorted(groups, key=lambda group: group.key))


def _add_metrics(
    metrics: MetricSums, carried: Sequence[CarriedGroup], trajectories: Sequence[Trajectory], version: int
) -> None:
    """Add one engine's metrics: counts of its `carried` groups, and the staleness of its `trajectories`."""
    paused = [member for group in carried for member in group.trajectories if not member.stop_reason]
    staleness = [trajectory.staleness(version) for trajectory in trajectories]
    metrics.add("partial/carried_trajectories", len(paused), 0)
    metrics.add("partial/carried_tokens", sum(member.num_sampled_tokens for member in paused), 0)
    metrics.add("partial/staleness_mean", sum(staleness), len(staleness))
    if staleness:
        metrics.add_max("partial/staleness_max", max(staleness))
