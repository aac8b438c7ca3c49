"""Gather, on rank 0, the gains of a step's turns, and the texts of its best and its worst rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from a2tgpo.parallel.collectives import all_gather_object, gather_object
from a2tgpo.parallel.groups import ParallelGroups
from a2tgpo.trajectory import Trajectory


class RolloutSummary(msgspec.Struct, frozen=True, array_like=True):
    """The values of a trajectory by which it is compared with the other trajectories of its step."""

    prompt_index: int
    sample_index: int
    reward: float
    gains: tuple[float | None, ...]
    """Gains, or scores, of the trajectory's process turns. An entry is None if the gain was not computed."""

    @classmethod
    def of(cls, trajectory: Trajectory, turn_signal: str = "gain") -> RolloutSummary:
        gains = tuple(turn.worth(turn_signal) for turn in trajectory.process_turns)
        return cls(trajectory.prompt_index, trajectory.sample_index, trajectory.outcome_reward, gains)

    @property
    def worth(self) -> tuple[float, float]:
        """Sort key: first the reward, then the sum of the gains."""
        return self.reward, sum(gain or 0.0 for gain in self.gains)


def gather_summaries(
    trajectories: Sequence[Trajectory], groups: ParallelGroups, *, turn_signal: str = "gain"
) -> list[RolloutSummary]:
    """Return the summaries of all replicas, sorted by prompt and sample.

    The first rank of every replica must call this.
    """
    own = msgspec.msgpack.encode([RolloutSummary.of(trajectory, turn_signal) for trajectory in trajectories])
    parts = all_gather_object(own, groups.dp_group)
    summaries = [s for part in parts for s in msgspec.msgpack.decode(part, type=list[RolloutSummary])]
    return sorted(summaries, key=lambda summary: (summary.prompt_index, summary.sample_index))


def best_and_worst(summaries: Sequence[RolloutSummary], count: int) -> dict[str, RolloutSummary]:
    """Choose the best and the worst rollouts, `count` in total, and return them by name: best_0, ..., worst_0, ...

    Rollouts are compared by reward, and if rewards are equal, by the sum of their gains. No rollout is chosen twice.
    """
    ordered = sorted(summaries, key=lambda summary: summary.worth, reverse=True)
    num_best = min((count + 1) // 2, len(ordered))
    num_worst = min(count // 2, len(ordered) - num_best)
    named = {f"best_{i}": summary for i, summary in enumerate(ordered[:num_best])}
    return named | {f"worst_{i}": ordered[-1 - i] for i in range(num_worst)}


def gains_by_turn(summaries: Sequence[RolloutSummary]) -> dict[int, list[float]]:
    """Return all computed gains of the step in one list per turn index. Turn indices count from 1."""
    gains: dict[int, list[float]] = {}
    for summary in summaries:
        for turn_index, gain in enumerate(summary.gains, start=1):
            if gain is not None:
                gains.setdefault(turn_index, []).append(gain)
    return dict(sorted(gains.items()))


def gather_texts(
    chosen: dict[str, RolloutSummary],
    trajectories: Sequence[Trajectory],
    text_of: Callable[[int], str],
    groups: ParallelGroups,
) -> dict[str, str]:
    """Return, on rank 0, the texts of the `chosen` rollouts by name, in order. Return {} on other ranks.

    The first rank of every replica must call this, with the same `chosen`.

    Args:
        trajectories: this replica's share of the step's trajectories.
        text_of: returns the text of the trajectory in a given row.
    """
    rows = {(t.prompt_index, t.sample_index): row for row, t in enumerate(trajectories)}
    places = {name: (summary.prompt_index, summary.sample_index) for name, summary in chosen.items()}
    own = {name: text_of(rows[place]) for name, place in places.items() if place in rows}
    texts = {name: text for part in gather_object(own, groups.dp_group) for name, text in part.items()}
    return {name: texts[name] for name in chosen if name in texts}
