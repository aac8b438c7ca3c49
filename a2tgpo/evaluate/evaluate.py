"""Greedy rollouts on held-out questions."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.reward.outcome import judged_text, score_response
from a2tgpo.rollout.group_rollout import GroupRollout, Progress
from a2tgpo.trajectory import Prompt, Trajectory


def evaluate(
    rollout: GroupRollout,
    prompts: Sequence[Prompt],
    *,
    replica_index: int,
    num_replicas: int,
    is_replica_first: bool = True,
    group: dist.ProcessGroup | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, float], list[Trajectory]]:
    """Answer every question once, greedily; every rank of `group` calls this.

    Args:
        rollout: this rank's.
        prompts: all questions, the same on all ranks; replica r plays prompts r, r + num_replicas, ...
        replica_index: which engine replica this rank belongs to.
        num_replicas: engine replicas in all.
        is_replica_first: this rank counts for its replica; the others played the same and count nothing.
        group: the ranks of all replicas; None: the world.
        progress: as in `GroupRollout.run`.

    Returns:
        Metrics over all questions, equal on all ranks: em (whatever the format), em_format_gated, f1,
        format_ok_rate, tool_calls, num_questions, and em by hops as em_1_hops and so on; and the trajectories
        that this replica played.
    """
    mine = prompts[replica_index::num_replicas]
    trajectories, _ = rollout.run(
        mine, seed=0, step=0, greedy=True, group_size=1, score_gain=False, progress=progress
    )
    sums = MetricSums()
    sums.add("num_questions", 0, 0)
    if is_replica_first:
        for prompt, trajectory in zip(mine, trajectories, strict=True):
            _add(sums, prompt, trajectory, rollout.turn_texts(trajectory))
    return sums.reduce(group), trajectories


def _add(sums: MetricSums, prompt: Prompt, trajectory: Trajectory, texts: Sequence[str]) -> None:
    answered = [turn.query is not None for turn in trajectory.turns]
    outcome = score_response(judged_text(list(zip(texts, answered, strict=True))), prompt.answers)
    sums.add("num_questions", 1, 0)
    sums.add("em", outcome.exact_match, 1)
    sums.add("em_format_gated", outcome.exact_match if outcome.format_ok else 0.0, 1)
    sums.add("f1", outcome.f1, 1)
    sums.add("format_ok_rate", outcome.format_ok, 1)
    sums.add("tool_calls", trajectory.num_process_turns, 1)
    if prompt.hops:
        sums.add(f"em_{prompt.hops}_hops", outcome.exact_match, 1)
