"""Play a step without waiting for its longest trajectories (`rollout.partial`).

A step plays `prompts_per_step` + `extra_prompts` groups. Some groups are carried over from the previous step. The
others begin with new prompts. A trajectory pauses after the turn in which it reaches `tokens_per_step` sampled tokens
in the step. Kimi k1.5 (arXiv 2501.12599) pauses inside a response instead. The step trains on the oldest complete
groups. All other groups are carried over to the next step.

If too few groups are complete, the step plays the oldest unfinished groups to their end. The step also plays a group
to its end if the group would be too stale for a later step. Without dynamic sampling, no group is dropped while the
settings stay the same.

With `rollout.dynamic_sampling`, a complete group counts only if it is informative. Other complete groups are dropped.
If all groups are complete and too few of them are informative, the step draws further prompts, and plays them to
their end. A step draws at most `max_draws` times. If groups are then still missing, dropped groups fill the step.

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
from dataclasses import dataclass

from a2tgpo.collect.carried_pool import (
    Carried,
    Entry,
    engines_for,
    is_due,
    kept_of,
    select,
    to_finish,
    trajectories_of,
    with_complete,
)
from a2tgpo.collect.informative import SamplingReport, draw_size, is_informative
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


@dataclass(kw_only=True)
class _Pool:
    """The groups of a step: those that were carried over, and those that begin in the step."""

    entries: list[Entry]
    own: list[CarriedGroup]
    """The groups of this rank's engine."""
    draws: int = 0
    num_unbounded: int = 0
    """Number of unfinished groups that the step continued without a token budget."""


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
        self._is_dynamic = config.dynamic_sampling
        self._max_draws = config.max_draws if config.dynamic_sampling else 1
        self._config = config.partial
        self._report = SamplingReport(config, engine_group, num_questions=state.sampler.num_questions)
        self._rollout = rollout
        self._prompts = prompts
        self._state = state
        self._engine_group = engine_group

    def play(self, version: int, counts: RolloutCounts, metrics: MetricSums) -> list[Trajectory] | None:
        """Play a step, update the carried groups, and return this engine's trajectories of the step's groups.

        Return None if any rank interrupted the rollout. The caller must then restore the state before its next use.
        """
        pool = _Pool(entries=list(self._state.carried.entries), own=list(self._state.carried.own))
        if not self._play_until_full(pool, version, counts):
            return None
        taken, left = select(pool.entries, num_groups=self._num_groups)
        kept, surplus = left[: self._config.extra_prompts], left[self._config.extra_prompts :]
        trajectories = trajectories_of(pool.own, taken)
        metrics.add("partial/unbounded_groups", pool.num_unbounded, 1)
        metrics.add("partial/pool_groups", len(kept), 1)
        if self._is_dynamic:
            self._report_draws(pool, version, metrics, taken=taken, num_surplus=len(surplus))
        keys = {entry.key for entry in kept}
        carried = Carried(entries=tuple(kept), own=_by_age(group for group in pool.own if group.key in keys))
        self._state.carried = carried
        if self._engine_group.is_leader:
            _add_metrics(metrics, carried.own, trajectories, version)
        return trajectories

    def _play_until_full(self, pool: _Pool, version: int, counts: RolloutCounts) -> bool:
        """Play the groups of `pool` and new prompts until the step has enough complete groups.

        Return False if any rank interrupted the rollout.
        """
        missing = self._num_groups + self._config.extra_prompts - len(pool.entries)
        assert missing >= self._num_groups, "no more than extra_prompts groups are carried over"
        self._draw(pool, missing, version)
        wave = {entry.key for entry in pool.entries}
        unbounded = {
            entry.key
            for entry in pool.entries
            if is_due(entry, version, max_staleness=self._config.max_staleness)
        }
        pool.num_unbounded = sum(not entry.is_complete for entry in pool.entries if entry.key in unbounded)
        while wave:
            chosen = [group for group in pool.own if group.key in wave]
            played = self._play(chosen, counts, version=version, unbounded=unbounded)
            agreed = self._agree_on_complete(played)
            if agreed is None or played is None:
                return False
            pool.own = [group for group in pool.own if group.key not in wave] + played
            complete, dropped = agreed
            pool.entries = with_complete(pool.entries, complete, dropped=dropped)
            late = to_finish(pool.entries, num_groups=self._num_groups)
            if not late and pool.draws < self._max_draws:
                late = self._draw(pool, self._size_of_draw(pool.entries), version)
            wave = unbounded = {entry.key for entry in late}
            pool.num_unbounded += len(late)
        return True

    def _size_of_draw(self, entries: Sequence[Entry]) -> int:
        """Return how many further prompts the step must draw, as far as questions are left."""
        return draw_size(
            kept_of(entries),
            num_groups=self._num_groups,
            num_engines=self._engine_group.count,
            num_left=self._state.sampler.num_questions - len(entries),
        )

    def _draw(self, pool: _Pool, size: int, version: int) -> list[Entry]:
        """Draw `size` new prompts, add their groups to `pool`, and return their entries."""
        if size == 0:
            return []
        questions = [entry.question for entry in pool.entries if entry.begun == version]
        first, engines = len(questions), self._engine_group
        questions += self._state.sampler.next_indices(
            size, excluded=[entry.question for entry in pool.entries]
        )
        owners = engines_for(pool.entries, size, num_engines=engines.count)
        drawn = [
            Entry(begun=version, index=index, question=questions[index], engine=owner)
            for index, owner in enumerate(owners, start=first)
        ]
        mine = [entry.index for entry in drawn if entry.engine == engines.index]
        pool.entries += drawn
        pool.own += [
            CarriedGroup(begun=version, question=questions[prompt.index], prompt=prompt)
            for prompt in self._prompts.prompts(questions, mine)
        ]
        pool.draws += 1
        return drawn

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

    def _report_draws(
        self, pool: _Pool, version: int, metrics: MetricSums, *, taken: Sequence[Entry], num_surplus: int
    ) -> None:
        """Add the metrics of dynamic sampling, which describe the groups that this step completed."""
        before = {entry.key for entry in self._state.carried.entries if entry.is_complete}
        ended = [entry for entry in pool.entries if entry.is_complete and entry.key not in before]
        keys = {entry.key for entry in ended}
        self._report.add(
            metrics,
            version=version,
            draws=pool.draws,
            informative=kept_of(ended),
            num_surplus=num_surplus,
            num_unfilled=sum(entry.is_dropped for entry in taken),
            played=[member for group in pool.own if group.key in keys for member in group.trajectories],
        )

    def _agree_on_complete(
        self, groups: Sequence[CarriedGroup] | None
    ) -> tuple[set[tuple[int, int]], set[tuple[int, int]]] | None:
        """Return the keys of all engines' complete groups, and the keys of those that dynamic sampling drops.

        Return None if any rank interrupted its rollout.
        """
        mine = None
        if groups is not None:
            complete = [group for group in groups if group.is_complete]
            # Only the leaders know rewards.
            judged = complete if self._is_dynamic and self._engine_group.is_leader else []
            dropped = [group.key for group in judged if not is_informative(group.trajectories)]
            mine = [group.key for group in complete], dropped
        parts = all_gather_object(mine, world_group())
        if any(part is None for part in parts):
            return None
        complete_keys, dropped_keys = ({key for part in parts for key in part[kind]} for kind in range(2))
        return complete_keys, dropped_keys


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
