"""Collectives for tensors, objects and bytes that work with gloo and with NCCL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from a2tgpo.parallel.groups import ParallelGroups


def device_of(group: ProcessGroup) -> torch.device:
    """Return the device on which a tensor must be so that `group` can communicate it."""
    if dist.get_backend(group) == dist.Backend.NCCL:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def world_group() -> ProcessGroup:
    """Return the group of all ranks. torch.distributed must be initialised."""
    group = dist.group.WORLD
    assert group is not None, "torch.distributed is not initialised"
    return group


def all_reduce_sum(tensor: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Return the sum of `tensor` over `group`, as a new tensor on the same device. Every rank must call this."""
    return _all_reduce(tensor, dist.ReduceOp.SUM, group)


def all_reduce_max(tensor: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Return the elementwise maximum over `group`, as a new tensor on the same device. Every rank must call this."""
    return _all_reduce(tensor, dist.ReduceOp.MAX, group)


def _all_reduce(tensor: torch.Tensor, op: Any, group: ProcessGroup) -> torch.Tensor:
    reduced = tensor.detach().to(device_of(group), copy=True)
    dist.all_reduce(reduced, op=op, group=group)
    return reduced.to(tensor.device)


def all_gather_object(value: Any, group: ProcessGroup) -> list[Any]:
    """Return the picklable `value` of every rank of `group`, in rank order. Every rank must call this."""
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def gather_object(value: Any, group: ProcessGroup) -> list[Any]:
    """Return, on the first rank of `group`, every rank's `value` in rank order. Every rank must call this.

    The other ranks get an empty list.
    """
    values: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
    dist.gather_object(value, values, group=group, group_dst=0)
    return values or []


def broadcast_object(value: Any, group: ProcessGroup, *, source: int) -> Any:
    """Return the `value` of rank `source` of `group`, on every rank. Every rank must call this."""
    box = [value]
    dist.broadcast_object_list(box, group_src=source, group=group, device=device_of(group))
    return box[0]


def from_last_stage(value: Any, groups: ParallelGroups) -> Any:
    """Return the last pipeline stage's `value` on all stages of a replica. Every stage must call this."""
    if groups.pp_size == 1:
        return value
    return broadcast_object(value, groups.pp_group, source=groups.pp_size - 1)


def broadcast_bytes(content: bytes, group: ProcessGroup) -> bytes:
    """Return the first rank's `content` on every rank of `group`. Every rank must call this."""
    if group.size() == 1:
        return content
    device = device_of(group)
    length = torch.tensor(len(content), dtype=torch.int64, device=device)
    dist.broadcast(length, group_src=0, group=group)
    if not length:
        return b""
    sent = _as_tensor([content]) if group.rank() == 0 else torch.empty(int(length), dtype=torch.uint8)
    sent = sent.to(device)
    dist.broadcast(sent, group_src=0, group=group)
    return content if group.rank() == 0 else sent.cpu().numpy().tobytes()


def send_bytes(payloads: Sequence[bytes], to: Sequence[int], group: ProcessGroup) -> list[bytes]:
    """Send `payloads[i]` to rank `to[i]` of `group`, and return the payload received from each rank.

    A payload is b"" if the rank sent none. Every rank of `group` must call this with the same `to`, even if the rank
    sends nothing. `to` must not contain a rank twice. The ranks first exchange all lengths. In the following
    all-to-all, two ranks communicate only if one has a payload for the other.
    """
    if len(payloads) != len(to):
        raise ValueError(f"{len(payloads)} payloads for {len(to)} ranks; give one for each, b'' for none")
    size, device = group.size(), device_of(group)
    own = torch.tensor([len(payload) for payload in payloads], dtype=torch.int64, device=device)
    lengths = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(lengths, own, group=group)
    place = to.index(group.rank()) if group.rank() in to else None
    incoming = [0] * size if place is None else torch.stack(lengths)[:, place].tolist()
    by_rank = dict(zip(to, payloads, strict=True))
    outgoing = [by_rank.get(rank, b"") for rank in range(size)]
    sent = _as_tensor(outgoing).to(device)
    received = torch.empty(sum(incoming), dtype=torch.uint8, device=device)
    dist.all_to_all_single(received, sent, incoming, [len(part) for part in outgoing], group=group)
    return [part.numpy().tobytes() for part in received.cpu().split(incoming)]


def _as_tensor(parts: Sequence[bytes]) -> torch.Tensor:
    """Return the concatenation of `parts`, [number of bytes] uint8."""
    # Use a bytearray, because torch warns about immutable memory. frombuffer rejects an empty buffer.
    joined = bytearray().join(parts)
    return torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)
