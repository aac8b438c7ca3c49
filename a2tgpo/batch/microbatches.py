"""Pack trajectories into micro-batches. If possible, all data-parallel replicas make the same number of
micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed import ProcessGroup

from a2tgpo.batch.balance import microbatches
from a2tgpo.batch.expert_rows import ExpertShape
from a2tgpo.batch.packing import Alignment, PackedBatch, pack, packed_length
from a2tgpo.parallel.collectives import all_reduce_max
from a2tgpo.trajectory import Trajectory


def pack_microbatches(
    trajectories: Sequence[Trajectory],
    rows: Sequence[int],
    *,
    max_tokens: int,
    align: Alignment,
    dp_group: ProcessGroup,
    expert_shape: ExpertShape | None = None,
) -> list[PackedBatch]:
    """Pack `trajectories[i] for i in rows` of this data-parallel replica. Every rank must call this.

    The replica that needs the most micro-batches determines their number. The other replicas make the same number of
    micro-batches. A replica with fewer trajectories than this number makes one micro-batch for each trajectory.
    """
    lengths = [align.segment_length(packed_length(trajectories[i])) for i in rows]
    fewest = torch.tensor(len(microbatches(lengths, max_tokens, row=align.row)))
    agreed = int(all_reduce_max(fewest, dp_group))
    grouped = microbatches(lengths, max_tokens, min_count=agreed, row=align.row)
    return [
        pack(trajectories, [rows[i] for i in members], align=align, expert_shape=expert_shape)
        for members in grouped
        if members
    ]
