"""Leave out the trajectories that a reward could not judge."""

from __future__ import annotations

from collections.abc import Sequence

from a2tgpo.parallel.collectives import all_gather_object, world_group
from a2tgpo.reward.total import RewardFaultError
from a2tgpo.trajectory import Trajectory


def require_verdicts(trajectories: Sequence[Trajectory], *, max_share: float) -> None:
    """Raise an error on all ranks if too many of the step's trajectories have no reward because a reward failed.

    Every rank must call this.

    Args:
        trajectories: the trajectories of this rank's engine, whose inner branches count too. Empty if the rank is not
            the engine's leader.
        max_share: value of `reward.max_failed_share`.

    Raises:
        RewardFaultError: with a one-line message, if the share of trajectories without a reward, over all engines, is
            larger than `max_share`.
    """
    played = [one for t in trajectories for one in t.played]
    errors = [one.reward_error for one in played if one.reward_error is not None]
    parts = all_gather_object((len(errors), len(played), errors[-1:]), world_group())
    num_errors, total = sum(part[0] for part in parts), sum(part[1] for part in parts)
    if num_errors > max_share * total:
        last = next(part[2][0] for part in reversed(parts) if part[2])
        raise RewardFaultError(
            f"rewards: {num_errors} of {total} rollouts had no verdict (reward.max_failed_share={max_share:g}); "
            f"last: {last}"
        )


def split(trajectories: Sequence[Trajectory]) -> tuple[list[Trajectory], list[Trajectory]]:
    """Return the trajectories that have a reward, and those that a reward could not judge."""
    judged = [t for t in trajectories if t.reward_error is None]
    return judged, [t for t in trajectories if t.reward_error is not None]
