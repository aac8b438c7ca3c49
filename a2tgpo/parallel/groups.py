"""The record of this process's ranks and process groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class ParallelGroups:
    """The process groups to which this process belongs, their sizes, and the process's rank in each group.

    The global rank is tp_rank + tp_size * (cp_rank + cp_size * (dp_rank + dp_size * pp_rank)). The ranks of a
    tensor-parallel group are neighbours, because they communicate most. ep_rank is the process's position in its
    pipeline stage, modulo ep_size.
    """

    rank: int
    world_size: int
    local_rank: int
    """Index of this process on its machine. It is also the index of the process's GPU."""
    device: torch.device
    tp_rank: int
    tp_size: int
    tp_group: ProcessGroup
    cp_rank: int
    cp_size: int
    cp_group: ProcessGroup
    """Ranks that each hold one part of every sequence of this data-parallel replica."""
    pp_rank: int
    pp_size: int
    pp_group: ProcessGroup
    dp_rank: int
    dp_size: int
    dp_group: ProcessGroup
    """One rank of each data-parallel replica. Counts of trajectories and tokens are reduced over this group."""
    dp_cp_group: ProcessGroup
    """All ranks with the same weights as this rank. They reduce gradients and share out the optimizer state."""
    ep_rank: int
    ep_size: int
    ep_group: ProcessGroup
    """Ranks over which the experts of a stage's layers are distributed."""
    edp_group: ProcessGroup
    """Ranks of a stage that hold the same experts. The gradients of experts are reduced over this group."""

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
        """Return the global ranks of data-parallel replica `dp_index`, in ascending order."""
        assert 0 <= dp_index < self.dp_size, f"replica {dp_index} of {self.dp_size}"
        in_a_stage = self.tp_size * self.cp_size
        return [
            rank + in_a_stage * (dp_index + self.dp_size * pp)
            for pp in range(self.pp_size)
            for rank in range(in_a_stage)
        ]

    def cp_rank_of(self, rank: int) -> int:
        """Return the context-parallel rank of global rank `rank`."""
        return rank // self.tp_size % self.cp_size

    def dp_index_of(self, rank: int) -> int:
        """Return the index of the data-parallel replica to which global rank `rank` belongs."""
        return rank // (self.tp_size * self.cp_size) % self.dp_size
