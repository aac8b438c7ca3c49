"""Describe a distributed optimizer's state as shards. A shard is a rectangle of a parameter that one rank owns.

The distributed optimizer cuts its buffers into equal parts that ignore parameter boundaries, so a rank owns a range
`start:stop` of a flattened parameter. On disk, a parameter's state is one tensor with the parameter's global shape. A
rank's range covers a few rectangles of this tensor, and each rectangle is a view of the optimizer's own memory. A
save therefore gathers nothing, and a run of any layout reads straight into the optimizer's memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

PIECE_BYTES = 2**26
"""Largest size of a saved shard in bytes, unless one row is larger. A reader loads whole shards into host memory."""
UNCUT = 2**62
"""`piece_bytes` for a load: cut nothing, because torch would read a saved shard once for each of its pieces."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""The offset and the size of a rectangle in each dimension of its tensor."""


def is_distributed(optimizer: Any) -> bool:
    """Return whether Megatron's chain `optimizer` divides its state among the data-parallel ranks."""
    return all(isinstance(part, DistributedOptimizer) for part in optimizer.chained_optimizers)


def owned_shards(optimizer: Any, models: dict[str, Any], *, piece_bytes: int) -> dict[str, ShardedTensor]:
    """Return, under arbitrary keys, the shards of a distributed optimizer's state that this rank owns.

    Each shard is a view of the optimizer's memory. A float32 parameter is its own master weight, so it has no `param`
    shard.

    Args:
        optimizer: Megatron's chain of distributed optimizers, which must already have their moments.
        models: sharded state dicts of the model chunks, with the model's own parameters and no copies.
        piece_bytes: largest size of a shard in bytes. A row that is larger is not cut.

    Returns:
        Float32 shards, whose keys in the checkpoint are `optimizer.state.{param,exp_avg,exp_avg_sq}.PARAMETER`.
    """
    described = {id(base.data): base for base in _tensors_and_factories(models)}
    shards: dict[str, ShardedTensor] = {}
    for part in optimizer.chained_optimizers:
        for parameter, start, states in _slices(part):
            templates = list(_templates(described[id(parameter)]))
            for name, flat in states.items():
                for shard in _shards_of(templates, f"optimizer.state.{name}", flat, start, piece_bytes):
                    shards[str(len(shards))] = shard
    return shards


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Yield the rectangles that the elements `start:stop` of a row-major tensor form, in the order of the elements.

    The range consists of the end of one row, whole rows, and the beginning of another row. A partial row is divided
    again in the next dimension, so there are at most 2 * len(shape) - 1 rectangles.
    """
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:
        yield from _in_row(shape, last, start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from _in_row(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if last * row < stop:
        yield from _in_row(shape, last, 0, stop - last * row)


def _in_row(shape: Sequence[int], row: int, start: int, stop: int) -> Iterator[Box]:
    for offsets, sizes in boxes(shape[1:], start, stop):
        yield (row, *offsets), (1, *sizes)


def pieces(shape: Sequence[int], start: int, stop: int, *, max_elements: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) for each piece of the range `start:stop`. A piece has at most `max_elements` elements, or
    one row if a row has more."""
    row = math.prod(shape[1:])
    step = max(1, max_elements // row) * row
    cuts = [start, *range((start // step + 1) * step, stop, step), stop]
    yield from itertools.pairwise(cuts)


def _slices(part: Any) -> Iterator[tuple[Tensor, int, dict[str, Tensor]]]:
    """Yield (parameter, index of the slice's first element, state) for each slice of a parameter that this rank owns.

    The state maps `param`, `exp_avg` and `exp_avg_sq` to the flat slices of the master weights and of the moments.
    """
    for ranges_by_dtype in part.gbuf_ranges:
        for buckets in ranges_by_dtype.values():
            for bucket in buckets:
                for parameter, places in bucket["param_map"].items():
                    states = part._get_main_param_and_optimizer_states(parameter)
                    own = parameter.untyped_storage()._cdata
                    yield (
                        parameter,
                        places["param"].start,
                        {
                            name: value.detach()
                            for name, value in states.items()
                            # The step count is saved with the parameter groups.
                            if name != "step" and value.untyped_storage()._cdata != own
                        },
                    )


def _tensors_and_factories(models: dict[str, Any]) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    found, _ = extract_sharded_tensors_and_factories(models)
    yield from nested_values(found)


def _templates(base: ShardedTensor | ShardedTensorFactory) -> Iterator[tuple[int, ShardedTensor]]:
    """Yield each tensor that a parameter has on disk, with the index of its first element in the flattened parameter.

    Megatron saves some parameters as several tensors, for example the weight that joins the gate and up projections.
    """
    if isinstance(base, ShardedTensor):
        yield 0, base
        return
    whole = torch.empty(base.data.shape, dtype=base.data.dtype, device="meta")
    for tensor in nested_values(replace(base, data=whole).build()):
        assert tensor.data.is_contiguous(), f"{base.key} is saved in parts that are not ranges of it"
        yield tensor.data.storage_offset(), tensor


def _shards_of(
    templates: list[tuple[int, ShardedTensor]],
    prefix: str,
    flat: Tensor,
    start: int,
    piece_bytes: int,
) -> Iterator[ShardedTensor]:
    """Yield the shards of `flat`, whose first element is element `start` of the flattened parameter."""
    for first, template in templates:
        shape = template.local_shape
        low = max(start, first) - first
        high = min(start + flat.numel(), first + math.prod(shape)) - first
        if low >= high:
            continue
        for left, right in pieces(shape, low, high, max_elements=piece_bytes // flat.element_size()):
            position = left + first - start
            for offsets, sizes in boxes(shape, left, right):
                data = flat[position : position + math.prod(sizes)]
                position += math.prod(sizes)
                yield _shard(template, prefix, data, offsets, sizes)


def _shard(
    template: ShardedTensor, prefix: str, data: Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> ShardedTensor:
    """Return `data` as a shard with shape `sizes` at `offsets` within `template`."""
    ahead = template.prepend_axis_num
    data = data.view(*(1 for _ in range(ahead)), *sizes)
    return ShardedTensor(
        f"{prefix}.{template.key}",
        data,
        data.dtype,
        tuple(data.shape),
        template.global_shape,
        (
            *template.global_offset[:ahead],
            *(base + offset for base, offset in zip(template.global_offset[ahead:], offsets, strict=True)),
        ),
        None,  # the shards do not form a regular grid
        # No other data-parallel rank has this rectangle, so this rank's copy is replica 0.
        replica_id=(*template.replica_id[:2], 0),
        allow_shape_mismatch=template.allow_shape_mismatch,
    )
