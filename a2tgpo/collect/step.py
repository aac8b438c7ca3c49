"""Play the rollout of a step.

By default, a step plays one draw of prompts. With partial rollouts, the step takes complete groups from a larger pool
(`collect/partial.py`). With dynamic sampling, the step draws prompts until informative groups fill the step, and
drops the other groups (`collect/informative.py`).

With `rollout.tree`, these metrics describe the trees of the step's groups:

    tree/branches            number of trajectories that are branches
    tree/shared_turns        mean number of turns that a branch shares with its parent
    tree/shared_token_share  share of the sampled tokens, over all trajectories, that are copied from a parent

With `rollout.assignment=on_demand`, these metrics describe the division of the prompts among the engines:

    assignment/taken_groups      mean over the engines: number of groups that an engine took when it had a free slot
    assignment/taken_groups_max  the largest of these numbers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from a2tgpo.collect.assignment import Assignment, queue_store
from a2tgpo.collect.informative import SamplingReport, draw_size, informative_groups
from a2tgpo.collect.inner_branches import add_inner_branch_metrics
from a2tgpo.collect.partial import PartialRollout
from a2tgpo.collect.rewarded_rollout import RewardedRollout
from a2tgpo.collect.state import RolloutState
from a2tgpo.config.rollout import RolloutConfig
from a2tgpo.data.template import PromptSet
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.parallel.collectives import all_gather_object, world_group
from a2tgpo.parallel.engine_group import EngineGroup
from a2tgpo.rollout.counts import RolloutCounts
from a2tgpo.rollout.group_rollout import RolloutInterruptedError
from a2tgpo.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class PlayedStep:
    """The result of a step's rollout on one rank."""

    trajectories: list[Trajectory]
    """The trajectories that this engine played, with prompt_index in [0, prompts_per_step). The list is empty unless
    this rank is the leader of its engine."""
    metrics: MetricSums
    """The engine's counts and the `sampling/` or `partial/` metrics, not yet reduced over all ranks."""


class StepRollout:
    """Play the groups of every step. Every rank must make the same calls.

    Args:
        prompts: the training questions.
        state: the state that each step advances.
        startup: metrics of the start-up of this process. They are reported with its first rollout.
    """

    def __init__(
        self,
        config: RolloutConfig,
        rollout: RewardedRollout,
        prompts: PromptSet,
        state: RolloutState,
        engine_group: EngineGroup,
        *,
        startup: dict[str, float] | None = None,
    ):
        self._config = config
        self._rollout = rollout
        self._prompts = prompts
        self._state = state
        self._engine_group = engine_group
        self._assignment = Assignment(
            config, prompts, engine_group, store=queue_store() if config.assignment == "on_demand" else None
        )
        self._partial = PartialRollout(config, rollout, prompts, state, engine_group)
        self._report = SamplingReport(config, engine_group, num_questions=state.sampler.num_questions)
        self._startup = startup

    def play(self, *, version: int) -> PlayedStep | None:
        """Play a step with the weights of `version`. Every rank must call this.

        The engines must be awake and hold these weights. Return None if this rank's rollout was interrupted. With
        dynamic sampling or partial rollouts, return None if any rank's rollout was interrupted. After None, the
        caller must restore the state before its next use.
        """
        counts, metrics = RolloutCounts(), MetricSums()
        if self._config.partial.is_on:
            trajectories = self._partial.play(version, counts, metrics)
        elif self._config.dynamic_sampling:
            trajectories = self._play_until_full(version, counts, metrics)
        else:
            drawn = self._state.sampler.next_indices()
            trajectories = self._play_share(drawn, range(len(drawn)), version, counts)
        if trajectories is None:
            return None
        if not self._engine_group.is_leader:
            return PlayedStep(trajectories=[], metrics=metrics)
        add_rollout_counts(metrics, counts)
        informative = informative_groups(trajectories)
        metrics.add(
            "reward/equal_groups_share", len(informative) - sum(informative.values()), len(informative)
        )
        if self._config.tree.is_on:
            add_tree_metrics(metrics, trajectories)
        if self._config.assignment == "on_demand":
            metrics.add("assignment/taken_groups", counts.taken_groups, 1)
            metrics.add_max("assignment/taken_groups_max", counts.taken_groups)
        if self._config.inner_branches:
            add_inner_branch_metrics(metrics, trajectories, per_prompt=self._config.inner_branches)
        if self._startup is not None:
            for name, seconds in self._startup.items():
                metrics.add_max(name, seconds)
            if self._rollout.first_finished_s is not None:
                metrics.add_max("time/startup_to_rollout_s", self._rollout.first_finished_s)
            self._startup = None
        return PlayedStep(trajectories=trajectories, metrics=metrics)

    def _play_until_full(
        self, version: int, counts: RolloutCounts, metrics: MetricSums
    ) -> list[Trajectory] | None:
        sampler, num_groups = self._state.sampler, self._config.prompts_per_step
        questions: list[int] = []
        informative: list[bool] = []
        played: list[Trajectory] = []
        draws = 0
        while draws < self._config.max_draws:
            size = draw_size(
                informative,
                num_groups=num_groups,
                num_engines=self._engine_group.count,
                num_left=sampler.num_questions - len(questions),
            )
            if size == 0:
                break
            questions += sampler.next_indices(size, excluded=questions)
            # A position identifies a group within the step and seeds its rollouts, so a draw must not reuse the
            # positions of earlier draws.
            drawn = range(len(questions))[-size:]
            trajectories = self._play_share(questions, drawn, version, counts)
            found = self._agree_on_informative(drawn, trajectories)
            if found is None or trajectories is None:
                return None
            informative += found
            played += trajectories
            draws += 1
        selection = select_groups(informative, num_groups=num_groups)
        self._report.add(
            metrics,
            version=version,
            draws=draws,
            informative=informative,
            num_surplus=selection.num_surplus,
            num_unfilled=selection.num_unfilled,
            played=played,
        )
        return take_groups(played, selection.groups)

    def _play_share(
        self, questions: Sequence[int], drawn: range, version: int, counts: RolloutCounts
    ) -> list[Trajectory] | None:
        """Play the questions at the `drawn` positions, together with the other engines.

        Return the trajectories that this engine played.

        Return None if the rollout was interrupted.
        """
        prompts, queue = self._assignment.divide(questions, drawn)
        try:
            return self._rollout.play(prompts, version=version, counts=counts, queue=queue)
        except RolloutInterruptedError:
            return None

    def _agree_on_informative(
        self, drawn: range, trajectories: Sequence[Trajectory] | None
    ) -> list[bool] | None:
        """Return whether each group of the draw is informative, or None if any rank's rollout was interrupted."""
        world = world_group()
        mine = None
        if trajectories is not None:
            mine = informative_groups(trajectories) if self._engine_group.is_leader else {}
        parts = all_gather_object(mine, world)
        if any(part is None for part in parts):
            return None
        merged = {index: bit for part in parts for index, bit in part.items()}
        return [merged[index] for index in drawn]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The groups that a step trains on."""

    groups: list[int]
    """Positions of the step's groups among all groups played, in ascending order."""
    num_surplus: int
    """Number of informative groups that the step does not take."""
    num_unfilled: int
    """Number of uninformative groups that the step takes."""


def select_groups(informative: Sequence[bool], *, num_groups: int) -> Selection:
    """Select the first `num_groups` informative groups. If there are too few, add the first uninformative groups.

    Args:
        informative: whether each group is informative, in the order of the draws. At least `num_groups` values.
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
    """Return the trajectories of `groups`, each with the position of its group in `groups` as its prompt_index."""
    places = {group: place for place, group in enumerate(groups)}
    return [
        trajectory.renumbered(places[trajectory.prompt_index])
        for trajectory in trajectories
        if trajectory.prompt_index in places
    ]


def add_tree_metrics(metrics: MetricSums, trajectories: Sequence[Trajectory]) -> None:
    """Add the metrics of one engine's trees."""
    kept = [[len(turn.tokens) for turn in t.turns[: len(t.branch.owners)]] for t in trajectories if t.branch]
    metrics.add("tree/branches", len(kept), 0)
    metrics.add("tree/shared_turns", sum(map(len, kept)), len(kept))
    shared_tokens = sum(map(sum, kept))
    metrics.add("tree/shared_token_share", shared_tokens, sum(t.num_sampled_tokens for t in trajectories))


def add_rollout_counts(metrics: MetricSums, counts: RolloutCounts) -> None:
    """Add the counts of one engine's rollout to `metrics`. Only the leader of each engine may call this."""
    metrics.add("rollout/cached_prefix_share", counts.cached_prefix_tokens, counts.known_prefix_tokens)
    metrics.add("rollout/tool_wait_s", counts.tool_wait_s, 1)
    metrics.add("tools/calls", counts.tool_calls, 0)
    metrics.add("tools/failures", counts.failed_calls, 0)
    metrics.add_max("tools/outage_s", counts.outage_s)
    metrics.add("tools/hung_calls", counts.hung_calls, 0)
    metrics.add("tools/empty_queries", counts.empty_queries, 0)
    metrics.add("tools/truncated_observations", counts.truncated_observations, 0)
    for name, number in counts.tool_counts.items():
        metrics.add(name, number, 0)
    metrics.add("reward/failed", counts.failed_rewards, 0)
    metrics.add_max("reward/wait_s", counts.reward_wait_s)
    for name, number in counts.reward_counts.items():
        metrics.add(name, number, 0)
    metrics.add("gain/scored_tokens", counts.scored_tokens, 0)
    # To score, the engine computes scaffold, gold answer, and the part of the context that its KV cache lacks.
    metrics.add("gain/computed_tokens", counts.score_prompt_tokens - counts.score_cached_tokens, 0)
    metrics.add("speed/sampled_tokens", counts.sampled_tokens, 0)
