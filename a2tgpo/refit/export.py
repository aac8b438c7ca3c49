"""The policy's weights in bounded buckets, under their Hugging Face names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

NamedTensor = tuple[str, torch.Tensor]


def buckets(weights: Iterable[NamedTensor], *, bucket_bytes: int) -> Iterator[list[NamedTensor]]:
    """Group `weights` lazily so that no more than `bucket_bytes` of them are alive at once.

    A single tensor larger than that makes a bucket of its own. The bucket given out before must be dropped
    by the caller before it asks for the next.

    Args:
        weights: a lazy source that keeps nothing itself.
        bucket_bytes: largest sum of tensor sizes in a bucket.
    """
    bucket: list[NamedTensor] = []
    size = 0
    for name, tensor in weights:
        tensor_bytes = tensor.numel() * tensor.element_size()
        if bucket and size + tensor_bytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor_bytes
        del tensor  # or the loop variable would keep the last tensor of a bucket alive during the next
    if bucket:
        yield bucket
