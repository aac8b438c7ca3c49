"""Collectives in the shapes this program needs, on gloo and NCCL alike."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


def device_of(group: ProcessGroup) -> torch.device:
    """Where tensors must lie to travel over `group`."""
    if dist.get_backend(group) == dist.Backend.NCCL:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def all_reduce_sum(tensor: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Sum over the ranks of `group`, as a new tensor on the input's device; every rank of `group` calls this."""
    return _all_reduce(tensor, dist.ReduceOp.SUM, group)


def all_reduce_max(tensor: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Maximum over the ranks of `group`, as a new tensor; every rank of `group` calls this."""
    return _all_reduce(tensor, dist.ReduceOp.MAX, group)


def _all_reduce(tensor: torch.Tensor, op: Any, group: ProcessGroup) -> torch.Tensor:
    reduced = tensor.detach().to(device_of(group), copy=True)
    dist.all_reduce(reduced, op=op, group=group)
    return reduced.to(tensor.device)


def all_gather_object(value: Any, group: ProcessGroup) -> list[Any]:
    """`value` of every rank of `group`, in its order; for small picklable records."""
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def gather_object(value: Any, group: ProcessGroup) -> list[Any]:
    """`value` of every rank of `group`, in its order, on its first rank; [] on the others."""
    values: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
    dist.gather_object(value, values, group=group, group_dst=0)
    return values or []


def broadcast_object(value: Any, group: ProcessGroup, *, source: int) -> Any:
    """`value` of the rank at position `source` in `group`; what the others pass is ignored."""
    box = [value]
    dist.broadcast_object_list(box, group_src=source, group=group, device=device_of(group))
    return box[0]


def exchange_bytes(payloads: list[bytes], group: ProcessGroup) -> list[bytes]:
    """Send `payloads[i]` to rank i of `group`; return what each rank sent here, by source.

    Every rank of `group` calls this, also with nothing to send. One all-to-all for the lengths, one for the
    bytes: no rank sees what is not meant for it.
    """
    size = group.size()
    if len(payloads) != size:
        raise ValueError(
            f"{len(payloads)} payloads for a group of {size} ranks; give one per rank, b'' for none"
        )
    device = device_of(group)
    sent = torch.tensor([len(payload) for payload in payloads], dtype=torch.int64, device=device)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    received_lengths = received.tolist()
    # bytearray: torch warns about, and may not write to, memory that Python holds immutable.
    outgoing = torch.frombuffer(bytearray(b"".join(payloads) or b"\0"), dtype=torch.uint8)
    outgoing = outgoing[: sum(map(len, payloads))].to(device)
    incoming = torch.empty(sum(received_lengths), dtype=torch.uint8, device=device)
    dist.all_to_all_single(incoming, outgoing, received_lengths, sent.tolist(), group=group)
    return [part.cpu().numpy().tobytes() for part in incoming.split(received_lengths)]
