"""How a packed row is divided over context-parallel ranks."""

from __future__ import annotations

import torch
from torch import Tensor


def context_positions(cu_seqlens: Tensor, cp_size: int) -> Tensor:
    """Which positions of the row each context-parallel rank holds, in the order in which it holds them.

    Causal attention makes late positions dearer than early ones. Every segment is therefore cut into 2 * cp_size
    equal pieces, of which rank r holds piece r and piece 2 * cp_size - 1 - r ("zigzag"): all ranks do the same
    work, whatever the segments. Transformer Engine and Megatron's rotary embedding expect this division.

    Args:
        cu_seqlens: [segments + 1] integers, where segments begin and end, from 0 to T; lengths are multiples of
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
    # Stable, and every rank has equally many: rows of ascending positions.
    return torch.argsort(rank, stable=True).view(cp_size, -1)
