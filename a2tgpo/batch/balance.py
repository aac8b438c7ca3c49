"""Who trains on what: trajectories over data-parallel ranks, and a rank's trajectories over micro-batches.

Both answers depend on the lengths alone, so every rank that knows them reaches the same one by itself.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def deal(lengths: Sequence[int], num_bins: int) -> list[int]:
    """Give each item to a bin so that the bins' total lengths come close to each other.

    Longest first, each to the bin with the least so far (within 4/3 of the best possible, far closer with
    many items); ties go to the earlier item and the lower bin.

    Args:
        lengths: tokens of each item.
        num_bins: >= 1.

    Returns:
        For each item its bin, in [0, num_bins).
    """
    assert num_bins >= 1, f"num_bins is {num_bins}; at least one bin is needed"
    loads = [(0, 0, number) for number in range(num_bins)]  # (tokens, items, bin): a heap as it stands
    bins = [0] * len(lengths)
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        tokens, items, number = loads[0]
        bins[item] = number
        heapq.heapreplace(loads, (tokens + lengths[item], items + 1, number))
    return bins


def microbatches(lengths: Sequence[int], max_tokens: int, *, min_count: int = 0) -> list[list[int]]:
    """Group items into micro-batches of at most `max_tokens`, few and of near-equal size.

    Items of length 0 (see `packing.packed_length`) are left out. An item longer than `max_tokens` gets a
    micro-batch of its own.

    Args:
        lengths: tokens of each item.
        max_tokens: limit of one micro-batch.
        min_count: fewest micro-batches to return; the surplus ones are smaller, or empty past one item each.

    Returns:
        Item numbers of each micro-batch, ascending within it; none at all without items.
    """
    items = [item for item, length in enumerate(lengths) if length > 0]
    if not items:
        return [[] for _ in range(min_count)]
    sizes = [lengths[item] for item in items]
    num_halves = sum(2 * size > max_tokens for size in sizes)  # no two of them fit together
    fewest = max(min_count, num_halves, -(-sum(sizes) // max_tokens))
    for count in range(fewest, max(fewest, len(items)) + 1):
        groups: list[list[int]] = [[] for _ in range(count)]
        for item, number in zip(items, deal(sizes, count), strict=True):
            groups[number].append(item)
        if all(len(group) <= 1 or sum(lengths[item] for item in group) <= max_tokens for group in groups):
            break
    return groups
