"""A group of trajectories that may continue in a later step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from a2tgpo.rollout.multi_turn import MIN_TURN_TOKENS, Limits
from a2tgpo.trajectory import Prompt, Trajectory


@dataclass(frozen=True, kw_only=True)
class CarriedGroup:
    """A group of trajectories that is kept between steps. Continuing a group creates a new object."""

    begun: int
    """Version of the weights that played the group's first turn (see `Turn.version`)."""
    question: int
    """The prompt's index in its question set."""
    prompt: Prompt
    """The prompt, with its `index` in the step in which the group began."""
    trajectories: list[Trajectory] = field(default_factory=list)
    """The group's trajectories by sample index. A trajectory without a stop reason has not ended."""

    @property
    def key(self) -> tuple[int, int]:
        """A unique key within the run. The key sorts groups by age, and groups of the same step by prompt."""
        return self.begun, self.prompt.index

    @property
    def is_complete(self) -> bool:
        """Whether all trajectories of the group have ended."""
        return bool(self.trajectories) and all(member.stop_reason for member in self.trajectories)


def copied(trajectory: Trajectory) -> Trajectory:
    """Return a copy of `trajectory` that can continue without changing the original."""
    return dataclasses.replace(trajectory, turns=[dataclasses.replace(turn) for turn in trajectory.turns])


def shortened(group: CarriedGroup, limits: Limits) -> CarriedGroup:
    """Cut the trajectories of `group` that exceed `limits`, so that they can continue. Return the group.

    A trajectory is cut after the last turn that leaves room for another turn. If no turn leaves room, all turns are
    removed. A cut trajectory continues even if it had ended.
    """
    members = [_shortened(member, limits) for member in group.trajectories]
    if all(one is other for one, other in zip(members, group.trajectories, strict=True)):
        return group
    return dataclasses.replace(group, trajectories=members)


def _shortened(trajectory: Trajectory, limits: Limits) -> Trajectory:
    prompt = len(trajectory.prompt_tokens)
    room = min(limits.max_response_tokens, limits.max_model_len - prompt)
    has_ended = bool(trajectory.stop_reason)
    if trajectory.num_process_turns <= limits.max_turns and trajectory.num_tokens - prompt <= room - (
        0 if has_ended else MIN_TURN_TOKENS
    ):
        return trajectory
    contexts = trajectory.context_lengths[1 : limits.max_turns + 1]
    fitting = sum(length - prompt <= room - MIN_TURN_TOKENS for length in contexts)  # lengths ascend
    turns = [dataclasses.replace(turn) for turn in trajectory.turns[:fitting]]
    return dataclasses.replace(trajectory, turns=turns, stop_reason="")
