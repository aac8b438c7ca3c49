"""Gather full parameters from the ranks that hold their parts, one bucket ahead of the reader."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from a2tgpo.model.experts import is_expert
from a2tgpo.model.policy import Policy
from a2tgpo.parallel.groups import ParallelGroups


@dataclass(frozen=True)
class ParameterRecord:
    """The facts about a parameter that ranks of other stages need in order to receive it."""

    stage: int
    name: str
    shape: tuple[int, ...]
    """Shape of one rank's part."""
    split_dim: int | None
    """Dimension along which tensor-parallel ranks split the parameter. None for experts, and for parameters that are
    not split."""

    def num_parts(self, groups: ParallelGroups) -> int:
        """Return the number of parts that one gather collects from the tensor- or expert-parallel ranks."""
        if is_expert(self.name):
            return groups.ep_size
        return 1 if self.split_dim is None else groups.tp_size

    def num_bytes(self, groups: ParallelGroups, dtype: torch.dtype) -> int:
        """Return the size of all parts together, in bytes."""
        return torch.Size(self.shape).numel() * self.num_parts(groups) * dtype.itemsize


def record_of(stage: int, name: str, parameter: torch.nn.Parameter) -> ParameterRecord:
    is_split = getattr(parameter, "tensor_model_parallel", False) and not is_expert(name)
    split_dim = getattr(parameter, "partition_dim", 0) if is_split else None
    return ParameterRecord(stage, name, tuple(parameter.shape), split_dim)


def buckets(
    records: Sequence[ParameterRecord], groups: ParallelGroups, *, dtype: torch.dtype, bucket_bytes: int
) -> list[list[ParameterRecord]]:
    """Divide `records`, in order, into buckets of at most `bucket_bytes`. A larger parameter has its own bucket."""
    grouped: list[list[ParameterRecord]] = []
    size = 0
    for record in records:
        num_bytes = record.num_bytes(groups, dtype)
        if not grouped or size + num_bytes > bucket_bytes:
            grouped.append([])
            size = 0
        grouped[-1].append(record)
        size += num_bytes
    return grouped


def gather_ahead(
    policy: Policy,
    records: Sequence[ParameterRecord],
    local: Mapping[str, torch.Tensor],
    *,
    bucket_bytes: int,
) -> Iterator[tuple[ParameterRecord, list[torch.Tensor]]]:
    """Yield the parts of each parameter, in the order of `records`.

    Every rank must call this and exhaust the iterator. All collectives of a bucket are started, in the same order on
    all ranks, before the first parameter of the previous bucket is yielded. Two buckets are therefore in memory: the
    rest of the bucket that is being read, and the next bucket.

    Args:
        records: records of all stages, the same on all ranks.
        local: this rank's parts of its stage's parameters, by name. A part is read when its bucket is started.

    Yields:
        (record, its parts in rank order). A part may be the model's own memory. This function keeps no reference to
        the parts after the next item is requested.
    """
    stream = torch.cuda.Stream() if policy.groups.device.type == "cuda" else None
    in_flight: deque[_Gather] = deque()
    for bucket in [*buckets(records, policy.groups, dtype=policy.dtype, bucket_bytes=bucket_bytes), []]:
        in_reading, in_flight = in_flight, _start(policy, bucket, local, stream)
        while in_reading:
            yield in_reading.popleft().finish()


@dataclass
class _Gather:
    """A parameter whose parts are being sent to this rank."""

    record: ParameterRecord
    parts: list[torch.Tensor]
    arrival: dist.Work | None
    """The collective to wait for. None if all parts have arrived."""

    def finish(self) -> tuple[ParameterRecord, list[torch.Tensor]]:
        if self.arrival is not None:
            self.arrival.wait()
        return self.record, self.parts


def _start(
    policy: Policy,
    bucket: Sequence[ParameterRecord],
    local: Mapping[str, torch.Tensor],
    stream: torch.cuda.Stream | None,
) -> deque[_Gather]:
    """Start the collectives that bring the parameters of `bucket` to this rank.

    Each part is broadcast over the stages. The parts of a parameter are then gathered within each stage. With NCCL,
    only `stream` waits for a broadcast before the gather. With gloo, this process waits.
    """
    groups = policy.groups
    counts = [record.num_parts(groups) for record in bucket]
    # The memory belongs to the current stream, so `stream` first waits for the current stream.
    shards = [  # the part of one tensor- or expert-parallel rank
        local[record.name].data
        if record.stage == groups.pp_rank
        else torch.empty(record.shape, dtype=policy.dtype, device=groups.device)
        for record in bucket
    ]
    whole = [  # [parts * first dimension, ...]
        shard.new_empty(count * shard.size(0), *shard.shape[1:]) if count > 1 else shard
        for count, shard in zip(counts, shards, strict=True)
    ]
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream())
    started: deque[_Gather] = deque()
    with torch.cuda.stream(stream):
        arrivals = [
            dist.broadcast(shard, group_src=record.stage, group=groups.pp_group, async_op=True)
            if groups.pp_size > 1
            else None
            for record, shard in zip(bucket, shards, strict=True)
        ]
        for record, count, shard, parts, arrival in zip(bucket, counts, shards, whole, arrivals, strict=True):
            if count > 1:
                if arrival is not None:
                    arrival.wait()
                group = groups.ep_group if is_expert(record.name) else groups.tp_group
                arrival = dist.all_gather_into_tensor(parts, shard, group=group, async_op=True)
            started.append(_Gather(record, list(parts.chunk(count)), arrival))
    return started
