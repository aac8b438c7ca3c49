"""Find the groups that have an outcome advantage, and report on a step with dynamic sampling.

A group is informative if the outcome rewards of its trajectories, before a length penalty, are not all equal (DAPO,
arXiv 2503.14476, Eq. 11). The share of the other groups in a step is the metric `reward/equal_groups_share`.
Informative groups are a biased sample of the policy's rollouts, so some metrics of dynamic sampling cover all groups
that were played. With partial rollouts, these are the groups whose last trajectory ended in the step:

    sampling/draws                  number of draws in the step
    sampling/groups_played          number of groups that were played
    sampling/kept_share             share of informative groups among all groups played
    sampling/surplus_groups         number of informative groups that were dropped because they did not fit
    sampling/unfilled_groups        number of uninformative groups that the step takes for lack of informative ones
    sampling/reward_all_mean        mean outcome reward over all groups played
    sampling/format_error_rate_all  rate of format errors over all groups played
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from a2tgpo.config.rollout import RolloutConfig
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.parallel.engine_group import EngineGroup
from a2tgpo.trajectory import Trajectory

logger = logging.getLogger(__name__)


def is_informative(group: Sequence[Trajectory]) -> bool:
    """Return whether the rewards of a group, before a length penalty, are not all equal.

    Trajectories without a reward do not count.
    """
    return len({trajectory.task_reward for trajectory in group if trajectory.reward_error is None}) > 1


def informative_groups(trajectories: Sequence[Trajectory]) -> dict[int, bool]:
    """Return whether each group is informative, by prompt index."""
    groups: dict[int, list[Trajectory]] = {}
    for trajectory in trajectories:
        groups.setdefault(trajectory.prompt_index, []).append(trajectory)
    return {index: is_informative(group) for index, group in groups.items()}


def draw_size(informative: Sequence[bool], *, num_groups: int, num_engines: int, num_left: int) -> int:
    """Estimate from the share of informative groups so far how many prompts the next draw needs to fill the step.

    The result is 0 if the step is full, or if the step has drawn all questions.

    Args:
        informative: whether each group played so far is informative. Empty before the first draw.
        num_groups: the number of groups in a step. No draw has more prompts.
        num_engines: the number of engines. Each engine gets the same number of prompts if enough questions are left.
        num_left: the number of questions that the step has not drawn yet.
    """
    kept = sum(informative)
    missing = max(num_groups - kept, 0)
    wanted = math.ceil(missing * len(informative) / kept) if kept else num_groups
    return min(math.ceil(wanted / num_engines) * num_engines, num_groups, num_left)


class SamplingReport:
    """Records the metrics of dynamic sampling, and warns once if a step has too few informative groups.

    Args:
        num_questions: the number of training questions.
    """

    def __init__(self, config: RolloutConfig, engine_group: EngineGroup, *, num_questions: int):
        self._config = config
        self._engine_group = engine_group
        self._num_questions = num_questions
        self._has_warned = False

    def add(
        self,
        metrics: MetricSums,
        *,
        version: int,
        draws: int,
        informative: Sequence[bool],
        num_surplus: int,
        num_unfilled: int,
        played: Sequence[Trajectory],
    ) -> None:
        """Add the metrics of a step.

        Args:
            informative: whether each group is informative, for the groups that all engines played.
            num_surplus: number of informative groups that were dropped.
            num_unfilled: number of uninformative groups that the step takes.
            played: the trajectories of the groups that this engine played.
        """
        if num_unfilled:
            self._warn_once(version, draws, len(informative), num_unfilled)
        metrics.add("sampling/draws", draws, 1)
        metrics.add("sampling/groups_played", len(informative), 1)
        metrics.add("sampling/kept_share", sum(informative), len(informative))
        metrics.add("sampling/surplus_groups", num_surplus, 1)
        metrics.add("sampling/unfilled_groups", num_unfilled, 1)
        if self._engine_group.is_leader:
            judged = [t.outcome_reward for t in played if t.reward_error is None]
            metrics.add("sampling/reward_all_mean", sum(judged), len(judged))
            metrics.add("sampling/format_error_rate_all", sum(not t.format_ok for t in played), len(played))

    def _warn_once(self, version: int, draws: int, num_played: int, num_unfilled: int) -> None:
        is_first_rank = self._engine_group.is_leader and self._engine_group.index == 0
        if is_first_rank and not self._has_warned:
            logger.warning(
                "step %d: after %d draws (rollout.max_draws=%d) and %d of %d questions only %d of %d groups have "
                "rewards that differ; the others have no outcome advantage. Raise rollout.max_draws, or use "
                "questions that are neither too hard nor too easy (logged once; see sampling/unfilled_groups)",
                version + 1,
                draws,
                self._config.max_draws,
                num_played,
                self._num_questions,
                self._config.prompts_per_step - num_unfilled,
                self._config.prompts_per_step,
            )
        self._has_warned = True
