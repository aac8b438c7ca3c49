"""A prompt's group of trajectories that may go on in a later step than the one it was begun in."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from a2tgpo.trajectory import Prompt, Trajectory


@dataclass(frozen=True, kw_only=True)
class CarriedGroup:
    """What is kept of it between steps; nothing in it is changed, a group that was played on is another one."""

    begun: int
    """Step in which its prompt was asked, from 0."""
    question: int
    """The prompt's index in its question set."""
    prompt: Prompt
    """As it was asked: its `index` is that of the step `begun`."""
    trajectories: list[Trajectory] = field(default_factory=list)
    """By sample index; those without a stop reason go on. Empty: not begun yet."""

    @property
    def key(self) -> tuple[int, int]:
        """Names it within the run; orders groups by age, and by prompt within a step."""
        return self.begun, self.prompt.index

    @property
    def is_complete(self) -> bool:
        """Whether all its trajectories have ended."""
        return bool(self.trajectories) and all(member.stop_reason for member in self.trajectories)


def copied(trajectory: Trajectory) -> Trajectory:
    """A trajectory that can be played on while `trajectory` stays as it is."""
    return dataclasses.replace(trajectory, turns=[dataclasses.replace(turn) for turn in trajectory.turns])
