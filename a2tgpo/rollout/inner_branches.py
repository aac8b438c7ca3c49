"""Branches that begin inside a turn (`rollout.inner_branches`), as in APPO (arXiv 2606.12384).

An inner branch keeps the first turns of its parent and the beginning of the next turn, and plays the rest itself. Its
outcome shows how good this beginning is. No step trains on inner branches, and their gains are not measured.

The branches of a prompt begin when all its trajectories have ended, after the tokens whose entropy has the highest
z-scores. The entropy of a token is that of the distribution from which the token was sampled, and its z-score is
taken among all sampled tokens of the trajectory. A branch may begin after a token if

- the z-score is above 0, and the token's text is not blank,
- the token is not the last of its turn,
- the beginning of the turn does not end with a part of a stop string or of a character, because the engine looks for
  stop strings only in the text that it generates,
- the branch has room for at least `MIN_TURN_TOKENS` tokens.

If a prompt has too few such tokens, it gets fewer branches.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace

from a2tgpo.protocol.protocol import AgentProtocol
from a2tgpo.rollout.branch_point import BranchPoint, branch_of
from a2tgpo.rollout.carried_group import copied
from a2tgpo.rollout.multi_turn import MIN_TURN_TOKENS, Limits, LiveTrajectory
from a2tgpo.trajectory import Trajectory

TOP_LOGPROBS = 10
"""Number of the most probable tokens from whose log-probs an entropy is estimated, as in the authors' code."""
DIGITS = 3
"""Number of decimals to which z-scores are rounded. The last bits of an engine's log-probs depend on what else the
engine plays, so equal trajectories may have z-scores that differ in the last bits."""


class InnerBranching:
    """Decide where inner branches begin. All ranks of an engine make the same decisions.

    Args:
        count: number of inner branches per prompt.
        group_size: number of trajectories per prompt, without inner branches.
    """

    def __init__(self, count: int, *, group_size: int, limits: Limits, protocol: AgentProtocol):
        self._count = count
        self._group_size = group_size
        self._limits = limits
        self._protocol = protocol
        self._ended: dict[int, list[LiveTrajectory]] = {}
        """The trajectories of each prompt that have ended, as they were before they got rewards and gains."""

    def branches_after(self, done: LiveTrajectory) -> list[LiveTrajectory]:
        """Return the branches that begin now that `done` has ended. Usually there are none.

        Call this before `done` gets a reward, because branches copy its turns.
        """
        if done.is_inner:
            return []
        members = self._ended.setdefault(done.group.prompt.index, [])
        members.append(replace(done, trajectory=copied(done.trajectory)))
        if len(members) < self._group_size:
            return []
        members.sort(key=lambda member: member.trajectory.sample_index)
        return [
            branch_of(members[point.parent], point, sample_index=self._group_size + place)
            for place, point in enumerate(self._points(members))
        ]

    def _points(self, members: Sequence[LiveTrajectory]) -> list[BranchPoint]:
        """Return the best points. Points with equal z-scores are in the order of trajectories and tokens."""
        values = [
            (-score, member.trajectory.sample_index, turn, token + 1)
            for member in members
            for turn, scores in enumerate(z_scores(member.entropies))
            for token, score in enumerate(scores)
            if score > 0
        ]
        allowed: Iterator[BranchPoint] = (
            BranchPoint(parent, turn, num_tokens)
            for _, parent, turn, num_tokens in sorted(values)
            if self._may_begin(members[parent].trajectory, turn, num_tokens)
        )
        return [point for _, point in zip(range(self._count), allowed, strict=False)]

    def _may_begin(self, trajectory: Trajectory, turn_index: int, num_tokens: int) -> bool:
        """Return whether a branch may begin after the first `num_tokens` tokens of a turn."""
        turn = trajectory.turns[turn_index]
        past = sum(len(t.tokens) + len(t.observation_tokens) for t in trajectory.turns[:turn_index])
        response_room = self._limits.max_response_tokens - past - num_tokens
        model_room = self._limits.max_model_len - len(trajectory.prompt_tokens) - past - num_tokens
        if num_tokens >= len(turn.tokens) or min(response_room, model_room) < MIN_TURN_TOKENS:
            return False
        text_of, stops = self._protocol.text_of, self._protocol.stop_strings
        if not text_of(turn.tokens[num_tokens - 1 : num_tokens]).strip():
            return False
        begun = text_of(turn.tokens[:num_tokens])
        parts = ["\ufffd", *(stop[:length] for stop in stops for length in range(1, len(stop)))]
        return not begun.endswith(tuple(parts))


def z_scores(values: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return the z-scores of the values among all values, in lists as in `values`, rounded to `DIGITS` decimals."""
    flat = [value for part in values for value in part]
    if not flat:
        return [[] for _ in values]
    mean, spread = statistics.fmean(flat), statistics.pstdev(flat)
    return [[round((value - mean) / (spread + 1e-6), DIGITS) for value in part] for part in values]


def with_inner_branches(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """Move each inner branch into its parent, and return the other trajectories.

    Args:
        trajectories: whole groups, sorted by prompt and sample.
    """
    kept = [one for one in trajectories if one.branch is None or not one.branch.is_inner]
    parents = {(one.prompt_index, one.sample_index): one for one in kept}
    for one in trajectories:
        if one.branch is not None and one.branch.is_inner:
            parents[one.prompt_index, one.branch.parent].inner_branches.append(one)
    return kept
