"""Divide a packed row over the context-parallel ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from a2tgpo.parallel.groups import ParallelGroups


def context_positions(cu_seqlens: Tensor, cp_size: int) -> Tensor:
    """Return, for each context-parallel rank, the positions of the packed row that it holds.

    Every segment is cut into 2 * cp_size equal pieces. Rank r holds pieces r and 2 * cp_size - 1 - r ("zigzag", as in
    Transformer Engine and Megatron), so all ranks have the same amount of work under causal attention.

    Args:
        cu_seqlens: [segments + 1] integers, the segments' boundaries from 0 to T. The length of every segment must be
            a multiple of 2 * cp_size (see `packing.alignment`).

    Returns:
        [cp_size, T / cp_size] int64, on the device of `cu_seqlens`. Each row is in ascending order.
    """
    lengths = cu_seqlens.diff().long()
    num_pieces = 2 * cp_size
    assert not (lengths % num_pieces).any(), f"segments of {lengths.tolist()} tokens for {num_pieces} pieces"
    segment = torch.repeat_interleave(torch.arange(lengths.numel(), device=lengths.device), lengths)  # [T]
    position = torch.arange(segment.numel(), device=lengths.device)
    piece = (position - cu_seqlens[segment]) // (lengths // num_pieces)[segment]
    rank = torch.minimum(piece, num_pieces - 1 - piece)
    # Each row of the result is in ascending order, because the sort is stable.
    return torch.argsort(rank, stable=True).view(cp_size, -1)


def layer_positions(cu_seqlens: Tensor, groups: ParallelGroups, *, sequence_parallel: bool) -> Tensor:
    """Return the positions of a packed row that this rank computes in all layers except attention.

    Context-parallel ranks divide the row. Under sequence parallelism, tensor-parallel ranks divide each
    context-parallel rank's part. The row must be padded as `packing.alignment` requires.

    Returns:
        [n] int64, on the device of `cu_seqlens`.
    """
    if groups.cp_size > 1:
        positions = context_positions(cu_seqlens, groups.cp_size)[groups.cp_rank]
    else:
        positions = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    return positions.chunk(groups.tp_size)[groups.tp_rank] if sequence_parallel else positions
