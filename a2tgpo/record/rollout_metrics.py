"""Metrics of a step's trajectories: their rewards, turns, tool calls, gains and lengths."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.trajectory import Trajectory

PROBLEMS = {"malformed": "malformed_calls", "unknown_tool": "unknown_tools", "excess": "excess_calls"}
"""Maps each kind of problem (`Call.problem_kind`) to the name of the metric that counts the calls with it."""
SIGNAL_METRICS = {"gain": "gain", "scores": "turn_score"}
"""Maps each value of `algorithm.turn_signal` to the prefix of the metrics of the turns' gains or scores."""
_SQUARE = "square of "
"""Prefix of the names of metrics that sum the squares of a reward."""


def add_rollout_metrics(
    metrics: MetricSums, trajectories: Sequence[Trajectory], *, turn_signal: str = "gain"
) -> None:
    """Add the sums and counts of `trajectories` to `metrics`.

    Reduce `metrics` only over ranks that have different trajectories, so that no trajectory counts twice.

    Args:
        turn_signal: value of `algorithm.turn_signal`.
    """
    count = len(trajectories)
    metrics.add("reward/mean", sum(t.outcome_reward for t in trajectories), count)
    for name in sorted({name for t in trajectories for name in t.rewards}):
        values = [t.rewards[name] for t in trajectories if name in t.rewards]
        metrics.add(f"reward/{name}_mean", sum(values), len(values))
        metrics.add(f"{_SQUARE}reward/{name}", sum(value**2 for value in values), len(values))
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
    name = SIGNAL_METRICS[turn_signal]
    for trajectory in trajectories:
        for turn_index, turn in enumerate(trajectory.process_turns, start=1):
            if (worth := turn.worth(turn_signal)) is not None:
                metrics.add(f"{name}/turn_{turn_index}_mean", worth, 1)
                metrics.add(f"{name}/turn_{turn_index}_positive", worth > 0, 1)
    missing = sum(turn.worth(turn_signal) is None for turn in process_turns)
    metrics.add(f"{name}/missing_rate", missing, len(process_turns))


def with_deviations(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return reduced `metrics` with the standard deviation of each reward in place of the mean of its squares."""
    found = {name: value for name, value in metrics.items() if not name.startswith(_SQUARE)}
    for name in (name.removeprefix(_SQUARE) for name in metrics if name.startswith(_SQUARE)):
        variance = metrics[f"{_SQUARE}{name}"] - metrics[f"{name}_mean"] ** 2
        found[f"{name}_std"] = math.sqrt(max(0.0, variance))  # rounding may give less than 0
    return found
