"""Gather the values of a row's tokens from all context-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def gather_context(own: Tensor, positions: Tensor, cp_group: ProcessGroup) -> Tensor:
    """Return a packed row's values at all positions, [..., T], equal on all ranks.

    Every rank of `cp_group` must call this, and must compute the same loss from the result. Each rank then has the
    full gradient at its own positions, so the backward pass needs no communication.

    Args:
        own: [..., T / cp], the values at this rank's positions.
        positions: [cp, T / cp], the positions of each rank, see `context_split.context_positions`.
    """
    return _Gather.apply(own, positions, cp_group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, positions: Tensor, cp_group: ProcessGroup) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(cp_group.size())]
        dist.all_gather(parts, own.contiguous(), group=cp_group)
        ctx.save_for_backward(positions[cp_group.rank()])
        full = own.new_empty(*own.shape[:-1], positions.numel())
        full[..., positions.flatten()] = torch.cat(parts, dim=-1)
        return full

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (mine,) = ctx.saved_tensors
        return grad[..., mine], None, None
