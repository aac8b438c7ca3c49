"""A rank's trajectories as padded per-turn matrices: what the advantage functions work on."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from a2tgpo.advantage.anchor_state import NO_STATE, turn_states
from a2tgpo.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class TurnTable:
    """N trajectories of one rank, each with up to T process turns; N may be 0."""

    prompt_index: torch.Tensor
    """[N] int64 in [0, num_prompts), equal on all ranks for one prompt."""
    outcome: torch.Tensor
    """[N] float64: R_i."""
    num_process_turns: torch.Tensor
    """[N] int64: n_i."""
    info_gain: torch.Tensor
    """[N, T] float64: ig_{i,t} in column t-1; 0 where there is none."""
    has_gain: torch.Tensor
    """[N, T] bool: the turn exists and its gain could be computed."""
    state: torch.Tensor
    """[N, T + 1] int64: key of the state in which turn t was written, in column t-1; NO_STATE past the last turn."""
    num_prompts: int
    """Prompts of the whole batch, over all ranks."""

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


@dataclass(frozen=True, kw_only=True)
class TurnAdvantages:
    """One advantage per turn; column n_i is the final turn of trajectory i."""

    advantages: torch.Tensor
    """[N, T + 1] float64; 0 in columns past n_i."""
    normalized_gain: torch.Tensor
    """[N, T] float64: the gain after its group's normalisation; 0 where neutral."""
    normalized_outcome: torch.Tensor
    """[N] float64."""


def build_turn_table(trajectories: Sequence[Trajectory], *, num_prompts: int, max_turns: int) -> TurnTable:
    """Lay out gains, outcomes and states of this rank's trajectories.

    Args:
        max_turns: columns T; equal on all ranks, at least the largest number of process turns.
    """
    num = len(trajectories)
    info_gain = torch.zeros(num, max_turns, dtype=torch.float64)
    has_gain = torch.zeros(num, max_turns, dtype=torch.bool)
    state = torch.full((num, max_turns + 1), NO_STATE, dtype=torch.int64)
    for row, trajectory in enumerate(trajectories):
        process_turns = [turn for turn in trajectory.turns if turn.query is not None]
        for column, turn in enumerate(process_turns):
            if turn.info_gain is not None:
                info_gain[row, column] = turn.info_gain
                has_gain[row, column] = True
        states = turn_states(trajectory)
        state[row, : len(states)] = torch.tensor(states, dtype=torch.int64)
    has_gain &= info_gain.isfinite()
    return TurnTable(
        prompt_index=torch.tensor([t.prompt_index for t in trajectories], dtype=torch.int64),
        outcome=torch.tensor([t.outcome_reward for t in trajectories], dtype=torch.float64),
        num_process_turns=torch.tensor([t.num_process_turns for t in trajectories], dtype=torch.int64),
        info_gain=info_gain.where(has_gain, torch.zeros_like(info_gain)),
        has_gain=has_gain,
        state=state,
        num_prompts=num_prompts,
    )
