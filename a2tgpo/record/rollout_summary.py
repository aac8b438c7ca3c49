"""Select what rank 0 shows of a step's rollouts: gains by turn, and the texts of the best and the worst.

Replicas exchange each trajectory's place, reward and gains; only the chosen texts are sent to rank 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from a2tgpo.parallel.collectives import all_gather_object, gather_object
from a2tgpo.parallel.groups import ParallelGroups
from a2tgpo.trajectory import Trajectory


class RolloutSummary(msgspec.Struct, frozen=True, array_like=True):
    """The values of one trajectory that are compared."""

    prompt_index: int
    sample_index: int
    reward: float
    gains: tuple[float | None, ...]
    """Gains of its process turns; None where a gain was not computed."""

    @classmethod
    def of(cls, trajectory: Trajectory) -> RolloutSummary:
        gains = tuple(turn.info_gain for turn in trajectory.process_turns)
        return cls(trajectory.prompt_index, trajectory.sample_index, trajectory.outcome_reward, gains)

    @property
    def worth(self) -> tuple[float, float]:
        """Sort key: reward, then the sum of gains."""
        return self.reward, sum(gain or 0.0 for gain in self.gains)


def gather_summaries(trajectories: Sequence[Trajectory], groups: ParallelGroups) -> list[RolloutSummary]:
    """Return the summaries of all replicas, by prompt and sample; the first rank of every replica must call this."""
    own = msgspec.msgpack.encode([RolloutSummary.of(trajectory) for trajectory in trajectories])
    parts = all_gather_object(own, groups.dp_group)
    summaries = [s for part in parts for s in msgspec.msgpack.decode(part, type=list[RolloutSummary])]
    return sorted(summaries, key=lambda summary: (summary.prompt_index, summary.sample_index))


def best_and_worst(summaries: Sequence[RolloutSummary], count: int) -> dict[str, RolloutSummary]:
    """Choose `count` rollouts: the best (best_0, ...) and the worst (worst_0, ...) by reward, then by gain.

    If there are too few rollouts, none is shown twice.
    """
    ordered = sorted(summaries, key=lambda summary: summary.worth, reverse=True)
    num_best = min((count + 1) // 2, len(ordered))
    num_worst = min(count // 2, len(ordered) - num_best)
    named = {f"best_{i}": summary for i, summary in enumerate(ordered[:num_best])}
    return named | {f"worst_{i}": ordered[-1 - i] for i in range(num_worst)}


def gains_by_turn(summaries: Sequence[RolloutSummary]) -> dict[int, list[float]]:
    """Return every computed gain of the step, by turn index from 1."""
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
    """Return the texts of the `chosen` rollouts on rank 0, by name, in order; {} elsewhere.

    The first rank of every replica must call this.

    Args:
        chosen: equal on all callers.
        trajectories: this replica's share.
        text_of: returns the text of the trajectory at a row.
    """
    rows = {(t.prompt_index, t.sample_index): row for row, t in enumerate(trajectories)}
    places = {name: (summary.prompt_index, summary.sample_index) for name, summary in chosen.items()}
    own = {name: text_of(rows[place]) for name, place in places.items() if place in rows}
    texts = {name: text for part in gather_object(own, groups.dp_group) for name, text in part.items()}
    return {name: texts[name] for name in chosen if name in texts}
