"""Metrics of the inner branches of a step's groups (`rollout.inner_branches`).

branch/count              number of inner branches
branch/unfilled           number of inner branches that are missing, because too few tokens were suitable
branch/mean_position      mean share of the parent's sampled tokens that a branch keeps, 0 to 1
branch/sampled_tokens     mean number of tokens that a branch samples itself
branch/reward_mean        mean outcome reward of the branches
branch/equal_groups_share share of the prompts whose branches do not differ in outcome, and so teach nothing

A step leaves out a trajectory that no reward could judge, and with it the trajectory's branches. All metrics but
`branch/unfilled` leave these branches out too.
"""

from __future__ import annotations

from collections.abc import Sequence

from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.trajectory import Trajectory


def add_inner_branch_metrics(
    metrics: MetricSums, trajectories: Sequence[Trajectory], *, per_prompt: int
) -> None:
    """Add the metrics of one engine's inner branches.

    Args:
        per_prompt: value of `rollout.inner_branches`.
    """
    prompts = {parent.prompt_index for parent in trajectories}
    num_begun = sum(len(parent.inner_branches) for parent in trajectories)
    used = [parent for parent in trajectories if parent.reward_error is None]
    pairs = [(parent, branch) for parent in used for branch in parent.inner_branches]
    positions = [branch.num_shared_tokens / parent.num_sampled_tokens for parent, branch in pairs]
    sampled = [branch.num_sampled_tokens - branch.num_shared_tokens for _, branch in pairs]
    judged = [
        (parent.prompt_index, branch.outcome_reward)
        for parent, branch in pairs
        if branch.reward_error is None
    ]
    outcomes = [
        {value for index, value in judged if index == prompt}
        for prompt in {parent.prompt_index for parent in used}
    ]
    metrics.add("branch/count", len(pairs), 0)
    metrics.add("branch/unfilled", per_prompt * len(prompts) - num_begun, 0)
    metrics.add("branch/mean_position", sum(positions), len(positions))
    metrics.add("branch/sampled_tokens", sum(sampled), len(pairs))
    metrics.add("branch/reward_mean", sum(value for _, value in judged), len(judged))
    metrics.add("branch/equal_groups_share", sum(len(found) < 2 for found in outcomes), len(outcomes))
