"""Division of a packed row over context-parallel ranks."""

from __future__ import annotations

import torch
from torch import Tensor


def context_positions(cu_seqlens: Tensor, cp_size: int) -> Tensor:
    """Return the row's positions that each context-parallel rank holds, in the rank's order.

    With causal attention late positions cost more than early ones. Every segment is therefore cut into 2 * cp_size
    equal pieces; rank r holds pieces r and 2 * cp_size - 1 - r ("zigzag"), so that all ranks do equal work for any
    segments. Transformer Engine and Megatron's rotary embedding expect this division.

    Args:
        cu_seqlens: [segments + 1] integers, the segments' boundaries from 0 to T; lengths are multiples of
            2 * cp_size (see `packing.alignment`).

    Returns:
        [cp_size, T / cp_size] int64 on the same device; each row ascends, together they are 0 .. T - 1.
    """
    lengths = cu_seqlens.diff().long()
    num_pieces = 2 * cp_size
    assert not (lengths % num_pieces).any(), f"segments of {lengths.tolist()} tokens for {num_pieces} pieces"
    segment = torch.repeat_interleave(torch.arange(lengths.numel(), device=lengths.device), lengths)  # [T]
    position = torch.arange(segment.numel(), device=lengths.device)
    piece = (position - cu_seqlens[segment]) // (lengths // num_pieces)[segment]
    rank = torch.minimum(piece, num_pieces - 1 - piece)
    # The sort is stable and every rank has equally many positions, so each row of the result ascends.
    return torch.argsort(rank, stable=True).view(cp_size, -1)
