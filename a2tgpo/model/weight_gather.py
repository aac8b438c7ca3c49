"""Parameters in full from the ranks that hold parts of them: the next bucket travels while one is read."""

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
    """What ranks of other stages must know of a parameter to receive it."""

    stage: int
    name: str
    shape: tuple[int, ...]
    """Of one part."""
    split_dim: int | None
    """Dimension split over tensor-parallel ranks; None: every rank has all of it, or it is an expert."""

    def num_parts(self, groups: ParallelGroups) -> int:
        """How many ranks of a stage bring a part each; experts at the same place on their ranks travel together."""
        if is_expert(self.name):
            return groups.ep_size
        return 1 if self.split_dim is None else groups.tp_size

    def num_bytes(self, groups: ParallelGroups, dtype: torch.dtype) -> int:
        """All parts together."""
        return torch.Size(self.shape).numel() * self.num_parts(groups) * dtype.itemsize


def record_of(stage: int, name: str, parameter: torch.nn.Parameter) -> ParameterRecord:
    is_split = getattr(parameter, "tensor_model_parallel", False) and not is_expert(name)
    split_dim = getattr(parameter, "partition_dim", 0) if is_split else None
    return ParameterRecord(stage, name, tuple(parameter.shape), split_dim)


def buckets(
    records: Sequence[ParameterRecord], groups: ParallelGroups, *, dtype: torch.dtype, bucket_bytes: int
) -> list[list[ParameterRecord]]:
    """`records` in their order, in groups of at most `bucket_bytes`; a larger parameter is a bucket of its own."""
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
    local: Mapping[str, torch.nn.Parameter],
    *,
    bucket_bytes: int,
) -> Iterator[tuple[ParameterRecord, list[torch.Tensor]]]:
    """Every parameter's parts, in the order of `records`; every rank calls this and runs it to its end.

    All collectives of a bucket are issued, in the same order on all ranks, before anything of the bucket before it
    is given out, and waited for when their parameter's turn comes. So two buckets are alive: what is left of the one
    being read, and the one in flight.

    Args:
        records: of all stages, the same on all ranks.
        local: this stage's parameters, by name.

    Yields:
        (record, its parts in the order of their ranks). Parts may be the model's own memory, and are kept here no
        longer than until the next ones are asked for.
    """
    stream = torch.cuda.Stream() if policy.groups.device.type == "cuda" else None
    in_flight: deque[_Gather] = deque()
    for bucket in [*buckets(records, policy.groups, dtype=policy.dtype, bucket_bytes=bucket_bytes), []]:
        in_reading, in_flight = in_flight, _start(policy, bucket, local, stream)
        while in_reading:
            yield in_reading.popleft().finish()


@dataclass
class _Gather:
    """A parameter on its way to this rank."""

    record: ParameterRecord
    parts: list[torch.Tensor]
    arrival: dist.Work | None
    """None: all of it is here."""

    def finish(self) -> tuple[ParameterRecord, list[torch.Tensor]]:
        if self.arrival is not None:
            self.arrival.wait()
        return self.record, self.parts


def _start(
    policy: Policy,
    bucket: Sequence[ParameterRecord],
    local: Mapping[str, torch.nn.Parameter],
    stream: torch.cuda.Stream | None,
) -> deque[_Gather]:
    """Issue the collectives that bring `bucket` to this rank: a broadcast over the stages, a gather in each stage.

    A gather needs what the broadcast brings. Under NCCL that wait is `stream`'s alone: neither this process nor what
    the device does for the engine waits. Gloo knows no streams: a gather behind a broadcast waits for it here.
    """
    groups = policy.groups
    counts = [record.num_parts(groups) for record in bucket]
    # Memory comes from the current stream, where it is read and freed; `stream` begins when that has got so far.
    shards = [  # this tensor- or expert-parallel rank's part, on every stage
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
