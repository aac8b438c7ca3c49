"""Divide the ranks into engine groups. The ranks of a group share one vLLM engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from a2tgpo.config.run import RunConfig
from a2tgpo.io.errors import require
from a2tgpo.parallel.collectives import all_reduce_max
from a2tgpo.parallel.groups import ParallelGroups

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class EngineGroup:
    """The ranks that share this rank's engine."""

    index: int = 0
    """Index of the engine among all engines."""
    count: int = 1
    """Number of engines."""
    rank: int = 0
    """This rank's index among the ranks that share the engine."""
    group: dist.ProcessGroup | None = None
    """CPU process group of the ranks that share the engine. None if only this rank uses the engine."""

    @property
    def size(self) -> int:
        """Number of ranks that share the engine."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def is_leader(self) -> bool:
        """Whether this rank is the first of its engine. Only the first rank calls tools and keeps the
        trajectories.
        """
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this engine's share of `items`: every `count`-th item, beginning at position `index`."""
        return items[self.index :: self.count]

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is True on any rank of the engine. All ranks of the engine must call this."""
        if self.group is None:
            return flag
        return bool(all_reduce_max(torch.tensor(float(flag)), self.group).item())


ALONE = EngineGroup()
"""Engine group of the only rank of a run."""


def build_engine_group(config: RunConfig, groups: ParallelGroups) -> EngineGroup:
    """Return the group of `rollout.tensor_parallel` neighbouring ranks that share this rank's engine.

    Every rank must call this.

    Raises:
        ConfigError: with a one-line message, if `rollout.tensor_parallel` does not divide the number of ranks.
    """
    size = config.rollout.tensor_parallel
    require(
        groups.world_size % size == 0,
        "rollout.tensor_parallel",
        size,
        f"a divisor of the {groups.world_size} processes",
    )
    own, timeout = None, timedelta(seconds=config.parallel.timeout_s)
    for first in range(0, groups.world_size, size):
        ranks = list(range(first, first + size))
        # Communicate on the CPU. On the GPU, the ranks would have to wait for the engine's step before they could
        # share a tool's answer.
        group = dist.new_group(ranks, backend="gloo", timeout=timeout) if size > 1 else None
        if groups.rank in ranks:
            own = group
    return EngineGroup(
        index=groups.rank // size, count=groups.world_size // size, rank=groups.rank % size, group=own
    )
