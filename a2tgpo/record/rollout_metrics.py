"""Metrics of a step's trajectories: their rewards, turns, tool calls, gains and lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.trajectory import Trajectory

PROBLEMS = {"malformed": "malformed_calls", "unknown_tool": "unknown_tools", "excess": "excess_calls"}
"""Name of the metric that counts the calls with each kind of problem (`Call.problem_kind`)."""


def add_rollout_metrics(metrics: MetricSums, trajectories: Sequence[Trajectory]) -> None:
    """Add sums and counts of `trajectories`. Reduce `metrics` only over ranks with different trajectories."""
    count = len(trajectories)
    metrics.add("reward/mean", sum(t.outcome_reward for t in trajectories), count)
    metrics.add("reward/em", sum(t.exact_match for t in trajectories), count)
    metrics.add("reward/format_error_rate", sum(not t.format_ok for t in trajectories), count)
    metrics.add("turns/process_turns", sum(t.num_process_turns for t in trajectories), count)
    metrics.add("length/response_tokens", sum(t.num_sampled_tokens for t in trajectories), count)
    observed = [len(turn.observation_tokens) for t in trajectories for turn in t.turns]
    metrics.add("length/observation_tokens", sum(observed), count)
    metrics.add("length/total_tokens", sum(t.num_tokens for t in trajectories), count)
    for reason, number in Counter(t.stop_reason for t in trajectories).items():
        metrics.add(f"stop/{reason}", number, 0)
    process_turns = [turn for t in trajectories for turn in t.process_turns]
    calls = [call for turn in process_turns for call in turn.calls]
    made = [call for call in calls if call.problem is None]
    metrics.add("tools/failed_rate", sum(call.failed for call in made), len(made))
    metrics.add("tools/calls_per_turn", len(calls), len(process_turns))
    for tool, number in Counter(call.tool for call in made).items():
        metrics.add(f"tools/{tool}_calls", number, 0)
        metrics.add(f"tools/{tool}_failures", sum(call.failed for call in made if call.tool == tool), 0)
    for kind, name in PROBLEMS.items():
        metrics.add(f"tools/{name}", sum(call.problem_kind == kind for call in calls), 0)
    for prompt_hops in sorted({t.hops for t in trajectories}):
        members = [t for t in trajectories if t.hops == prompt_hops]
        metrics.add(f"reward/em_{prompt_hops}_hops", sum(t.exact_match for t in members), len(members))
    for trajectory in trajectories:
        for turn_index, turn in enumerate(trajectory.process_turns, start=1):
            if turn.info_gain is not None:
                metrics.add(f"gain/turn_{turn_index}_mean", turn.info_gain, 1)
                metrics.add(f"gain/turn_{turn_index}_positive", turn.info_gain > 0, 1)
    missing = sum(turn.info_gain is None for turn in process_turns)
    metrics.add("gain/missing_rate", missing, len(process_turns))
