"""Lay out a rank's trajectories as padded matrices with a column per turn."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from a2tgpo.advantage.anchor_state import NO_STATE, turn_states
from a2tgpo.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class TurnTable:
    """N trajectories of one rank, each with up to T process turns. N may be 0."""

    prompt_index: torch.Tensor
    """[N] int64 in [0, num_prompts): number of the prompt, the same on all ranks."""
    outcome: torch.Tensor
    """[N] float64: outcome reward R_i."""
    num_process_turns: torch.Tensor
    """[N] int64: number of process turns n_i."""
    info_gain: torch.Tensor
    """[N, T] float64: gain ig_{i,t} in column t-1. 0 if the turn has no gain."""
    has_gain: torch.Tensor
    """[N, T] bool: whether the turn exists and has a finite gain."""
    num_prompts: int
    """Number of prompts in the whole batch, over all ranks."""
    trajectories: Sequence[Trajectory]
    """[N]."""
    keep_single: bool = True
    """Whether GRPO's outcome advantage of a trajectory that is alone in its group is the outcome itself. If False, it
    is 0."""

    @property
    def max_turns(self) -> int:
        return self.info_gain.shape[1]

    @property
    def turn_bucket(self) -> torch.Tensor:
        """[N, T] int64: index of the turn group (prompt, turn_index)."""
        turns = torch.arange(self.max_turns, device=self.info_gain.device)
        return self.prompt_index[:, None] * self.max_turns + turns

    @property
    def num_turn_buckets(self) -> int:
        return self.num_prompts * self.max_turns

    @property
    def last_turn(self) -> torch.Tensor:
        """[N] int64: column of each trajectory's last turn. It is n_i, or n_i - 1 if there is no final turn."""
        lasts = [max(len(trajectory.turns), 1) - 1 for trajectory in self.trajectories]
        return torch.tensor(lasts, dtype=torch.int64)

    @cached_property
    def state(self) -> torch.Tensor:
        """[N, T + 1] int64: the key of the state before turn t, in column t-1. NO_STATE past the last turn.

        The keys are computed on first access, because hashing the observations takes time.
        """
        columns = self.max_turns + 1
        keys = [turn_states(trajectory) for trajectory in self.trajectories]
        rows = [own + [NO_STATE] * (columns - len(own)) for own in keys]
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), columns)


@dataclass(frozen=True, kw_only=True)
class TurnAdvantages:
    """One advantage per turn. Column n_i is the final turn of trajectory i."""

    advantages: torch.Tensor
    """[N, T + 1] float64, 0 in columns past n_i."""
    normalized_gain: torch.Tensor
    """[N, T] float64: the gain, normalised within its group. 0 if the turn has no gain."""
    normalized_outcome: torch.Tensor
    """[N] float64: the outcome, normalised within its group."""
    gain_spread: torch.Tensor | None = None
    """[N, T] float64: standard deviation of the gains in the turn group of each turn that has a gain. None if the
    method normalises no turn groups."""
    token_offsets: Sequence[torch.Tensor] | None = None
    """[N] tensors, float64: for each sampled token of a trajectory, over all turns, its advantage minus the advantage
    of its turn. None if all tokens of a turn have the same advantage."""


def build_turn_table(
    trajectories: Sequence[Trajectory],
    *,
    num_prompts: int,
    max_turns: int,
    failed_calls: str = "neutral",
    turn_signal: str = "gain",
    keep_single: bool = True,
) -> TurnTable:
    """Return the turn table of this rank's trajectories.

    Args:
        max_turns: number of columns T, equal on all ranks. No trajectory may have more process turns.
        failed_calls: value of `algorithm.failed_calls`. If it is `neutral`, a turn whose tool calls all failed
            has no gain.
        turn_signal: value of `algorithm.turn_signal`. If it is `scores`, the scores of the turns replace the gains.
        keep_single: value of `TurnTable.keep_single`.
    """
    rows = [
        [
            None if turn.tool_failed and failed_calls == "neutral" else turn.worth(turn_signal)
            for turn in t.process_turns
        ]
        for t in trajectories
    ]
    padded = [row + [None] * (max_turns - len(row)) for row in rows]
    shape = len(rows), max_turns
    has_gain = torch.tensor([[gain is not None for gain in row] for row in padded], dtype=torch.bool)
    info_gain = torch.tensor([[gain or 0.0 for gain in row] for row in padded], dtype=torch.float64)
    has_gain, info_gain = (
        has_gain.reshape(shape),
        info_gain.reshape(shape),
    )  # `torch.tensor([])` has only one dimension
    has_gain &= info_gain.isfinite()
    return TurnTable(
        prompt_index=torch.tensor([t.prompt_index for t in trajectories], dtype=torch.int64),
        outcome=torch.tensor([t.outcome_reward for t in trajectories], dtype=torch.float64),
        num_process_turns=torch.tensor([len(row) for row in rows], dtype=torch.int64),
        info_gain=info_gain.where(has_gain, torch.zeros_like(info_gain)),
        has_gain=has_gain,
        num_prompts=num_prompts,
        trajectories=trajectories,
        keep_single=keep_single,
    )
