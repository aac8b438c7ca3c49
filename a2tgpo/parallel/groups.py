"""Where this process stands in the layout, as a record that is passed in, never fetched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class ParallelGroups:
    """Ranks, sizes and process groups of one process.

    Global rank = tp_rank + tp_size * (dp_rank + dp_size * pp_rank): tensor-parallel ranks are neighbours, since
    they talk most, and pipeline stages are furthest apart. Of the ranks of a stage, counted by tp_rank + tp_size *
    dp_rank, expert-parallel ones are neighbours too: ep_rank is that count modulo ep_size.
    """

    rank: int
    world_size: int
    local_rank: int
    """Position on this machine; the GPU's number."""
    device: torch.device
    """Where this process computes."""
    tp_rank: int
    tp_size: int
    tp_group: ProcessGroup
    pp_rank: int
    pp_size: int
    pp_group: ProcessGroup
    dp_rank: int
    dp_size: int
    dp_group: ProcessGroup
    ep_rank: int
    ep_size: int
    ep_group: ProcessGroup
    """The ranks that share out the experts of a stage's layers; each expert is whole on one of them."""
    edp_group: ProcessGroup
    """Expert-data-parallel: the ranks of a stage that hold the same experts, and reduce their gradients."""
    model_group: ProcessGroup
    """The tensor x pipeline ranks that hold one replica of the model, this process among them."""

    @property
    def is_pipeline_first(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_pipeline_last(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    def dp_ranks_of(self, dp_index: int) -> list[int]:
        """Global ranks that form data-parallel replica `dp_index`, stage by stage, ascending."""
        assert 0 <= dp_index < self.dp_size, f"replica {dp_index} of {self.dp_size}"
        return [
            tp + self.tp_size * (dp_index + self.dp_size * pp)
            for pp in range(self.pp_size)
            for tp in range(self.tp_size)
        ]

    def dp_index_of(self, rank: int) -> int:
        """The data-parallel replica that global rank `rank` belongs to."""
        return rank // self.tp_size % self.dp_size
