"""Begin a trajectory at a place in another trajectory, which has ended."""

from __future__ import annotations

from dataclasses import dataclass, replace

from a2tgpo.rollout.multi_turn import LiveTrajectory
from a2tgpo.trajectory import Branch, LogProbs, TokenIds, Trajectory, Turn


@dataclass(frozen=True)
class BranchPoint:
    """A place at which a trajectory may branch."""

    parent: int
    """Sample index of the trajectory."""
    num_shared: int
    """Number of turns that the branch keeps."""
    num_tokens: int = 0
    """Number of tokens of the next turn that the branch keeps too."""


def branch_of(parent: LiveTrajectory, point: BranchPoint, *, sample_index: int) -> LiveTrajectory:
    """Return a branch of `parent`, with copies of the shared turns and with the scores of their contexts.

    The turns of an inner branch have no experts, because no step trains on them.
    """
    origin = parent.trajectory
    shared = origin.turns[: point.num_shared]
    trajectory = Trajectory(
        prompt_index=origin.prompt_index,
        prompt_id=origin.prompt_id,
        sample_index=sample_index,
        prompt_tokens=origin.prompt_tokens,
        turns=[replace(turn, experts=b"" if point.num_tokens else turn.experts) for turn in shared],
        stop_reason="",
        hops=origin.hops,
        branch=Branch(
            parent=origin.sample_index,
            root=origin.root,
            owners=tuple(origin.owners[: point.num_shared]),
            num_tokens=point.num_tokens,
        ),
    )
    live = LiveTrajectory(
        group=parent.group,
        trajectory=trajectory,
        tokens=trajectory.tokens,
        scores=parent.scores[: point.num_shared],
        num_past_turns=point.num_shared,
    )
    if point.num_tokens:
        begun = origin.turns[point.num_shared]
        live.opening = Turn(
            tokens=TokenIds(begun.tokens[: point.num_tokens]),
            rollout_logprobs=LogProbs(begun.rollout_logprobs[: point.num_tokens]),
        )
        live.tokens.extend(live.opening.tokens)
    return live
