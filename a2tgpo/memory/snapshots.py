"""Write snapshots of torch's GPU memory at the end of chosen memory phases."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

MAX_ENTRIES = 200_000
"""A snapshot lists this many of the newest allocations and frees, each with the line of code that made it."""


class MemorySnapshots:
    """Snapshots of this rank's GPU memory in one step. In the `with` block, torch records every allocation.

    Args:
        folder: an existing folder for the snapshots. The snapshot of a phase is `memory_PHASE.rank_R.pickle`, which
            https://docs.pytorch.org/memory_viz shows.
        phases: the phases at whose end a snapshot is written.
    """

    def __init__(self, folder: Path, phases: Collection[str], *, rank: int) -> None:
        self._folder, self._phases, self._rank = folder, phases, rank

    def __enter__(self) -> MemorySnapshots:
        torch.cuda.memory._record_memory_history(max_entries=MAX_ENTRIES)
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.memory._record_memory_history(enabled=None)

    def end_of(self, phase: str) -> None:
        """Write a snapshot if `phase` is one of the chosen phases."""
        if phase in self._phases:
            path = self._folder / f"memory_{phase}.rank_{self._rank}.pickle"
            torch.cuda.memory._dump_snapshot(str(path))
