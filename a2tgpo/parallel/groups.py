"""This process's place in the layout, as a record passed as an argument, never a global."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class ParallelGroups:
    """Ranks, sizes and process groups of one process.

    Global rank = tp_rank + tp_size * (cp_rank + cp_size * (dp_rank + dp_size * pp_rank)): tensor-parallel ranks are
    neighbours, since they communicate most, then context-parallel ones; pipeline stages are furthest apart.
    Expert-parallel ranks are also neighbours within a stage: ep_rank is the place in the stage modulo ep_size.
    """

    rank: int
    world_size: int
    local_rank: int
    """Position on this machine; the GPU's number."""
    device: torch.device
    """The device on which this process computes."""
    tp_rank: int
    tp_size: int
    tp_group: ProcessGroup
    cp_rank: int
    cp_size: int
    cp_group: ProcessGroup
    """The ranks that share this data-parallel replica's sequences, each with a part of every sequence."""
    pp_rank: int
    pp_size: int
    pp_group: ProcessGroup
    dp_rank: int
    dp_size: int
    dp_group: ProcessGroup
    """One rank of each data-parallel replica. Counts of trajectories and tokens are reduced over this group."""
    dp_cp_group: ProcessGroup
    """The ranks that hold the same weights: those of `dp_group`, each with its context-parallel ranks. Gradients are
    reduced, and optimizer state is split, over this group."""
    ep_rank: int
    ep_size: int
    ep_group: ProcessGroup
    """The ranks over which the experts of a stage's layers are distributed, each expert whole on one rank."""
    edp_group: ProcessGroup
    """Expert-data-parallel: the ranks of a stage that hold the same experts and reduce their gradients."""

    @property
    def is_pipeline_first(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_pipeline_last(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def is_replica_first(self) -> bool:
        """Whether this process is the first of its data-parallel replica."""
        return self.tp_rank == self.cp_rank == self.pp_rank == 0

    def dp_ranks_of(self, dp_index: int) -> list[int]:
        """Return the global ranks of data-parallel replica `dp_index`, stage by stage, ascending."""
        assert 0 <= dp_index < self.dp_size, f"replica {dp_index} of {self.dp_size}"
        in_a_stage = self.tp_size * self.cp_size
        return [
            rank + in_a_stage * (dp_index + self.dp_size * pp)
            for pp in range(self.pp_size)
            for rank in range(in_a_stage)
        ]

    def cp_rank_of(self, rank: int) -> int:
        """Return the position of global rank `rank` in its context-parallel group."""
        return rank // self.tp_size % self.cp_size

    def dp_index_of(self, rank: int) -> int:
        """Return the data-parallel replica of global rank `rank`."""
        return rank // (self.tp_size * self.cp_size) % self.dp_size
