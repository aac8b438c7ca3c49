"""Reduce-scatter of gradients and all-gather of weights, for ranks without a GPU.

Gloo's own functions copy all shards of all ranks, and gloo's reduce-scatter sums all of them on every rank. Here each
rank sends only what other ranks need, straight from its buffer. The functions are always synchronous, even if
Megatron passes `async_op`. Every rank of the group must call them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

PIECE = 2**20
"""Number of elements that a rank receives and adds at a time. The CPU's cache still has a piece when it is added."""


def reduce_scatter(
    output: Tensor, input: Tensor, op: Any = dist.ReduceOp.SUM, group: ProcessGroup | None = None, **_: Any
) -> None:
    """Sum the shard that belongs to this rank over all ranks, and write the sum into `output`.

    With two ranks the result equals gloo's to the bit. With more ranks the order of the sum differs from gloo's.

    Args:
        output: [n]. May be this rank's shard of `input`.
        input: [ranks x n], contiguous. Shard i belongs to rank i of `group`.
        op: must be SUM.
        group: None: all ranks.
    """
    assert op == dist.ReduceOp.SUM, f"the reduction is {op}; only SUM is implemented"
    group = group or _all_ranks()
    rank, size = group.rank(), group.size()
    shards = input.view(size, -1)
    _copy(shards[rank], output)
    for offset in range(1, size):
        to, source = (rank + offset) % size, (rank - offset) % size
        sent: list[Any] = [dist.isend(piece, group=group, group_dst=to) for piece in shards[to].split(PIECE)]
        _add_from(source, output, group)
        for work in sent:
            work.wait()


def all_gather(output: Tensor, input: Tensor, group: ProcessGroup | None = None, **_: Any) -> None:
    """Write the shards of all ranks into `output`.

    Args:
        output: [ranks x n], contiguous. Shard i comes from rank i of `group`.
        input: [n]. May be this rank's shard of `output`.
        group: None: all ranks.
    """
    group = group or _all_ranks()
    rank, size = group.rank(), group.size()
    shards = output.view(size, -1)
    _copy(input, shards[rank])
    for offset in range(1, size):
        to, source = (rank + offset) % size, (rank - offset) % size
        sent: Any = dist.isend(shards[rank], group=group, group_dst=to)
        dist.recv(shards[source], group=group, group_src=source)
        sent.wait()


def _all_ranks() -> ProcessGroup:
    group = dist.group.WORLD
    assert group is not None, "torch.distributed is not initialised"
    return group


def _copy(source: Tensor, target: Tensor) -> None:
    if source.data_ptr() != target.data_ptr():
        target.copy_(source)


def _add_from(source: int, output: Tensor, group: ProcessGroup) -> None:
    """Receive a shard from rank `source` of `group`, and add it to `output`. Each piece arrives while its predecessor
    is added."""
    pieces = output.split(PIECE)
    buffers = [torch.empty_like(piece) for piece in pieces[:2]]

    def receive(number: int) -> tuple[Tensor, Any]:
        buffer = buffers[number % 2][: len(pieces[number])]
        return buffer, dist.irecv(buffer, group=group, group_src=source)

    arriving = receive(0)
    for number, piece in enumerate(pieces):
        buffer, work = arriving
        work.wait()
        if number + 1 < len(pieces):
            arriving = receive(number + 1)
        piece.add_(buffer)
