"""Divide trajectories over data-parallel replicas, and the trajectories of one replica over micro-batches.

Both divisions depend only on the trajectories' lengths, so all ranks compute the same divisions.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def deal(lengths: Sequence[int], num_bins: int) -> list[int]:
    """Assign each item to a bin so that the bins have similar total lengths. Return the index of each item's bin.

    The items are taken from the longest to the shortest. Each goes into the bin that has the fewest tokens so far.
    The largest bin has at most 4/3 times as many tokens as the largest bin of the best possible assignment.
    """
    assert num_bins >= 1, f"num_bins is {num_bins}; at least one bin is needed"
    loads = [(0, 0, number) for number in range(num_bins)]  # (tokens, items, bin); a sorted list is a heap
    bins = [0] * len(lengths)
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        tokens, items, number = loads[0]
        bins[item] = number
        heapq.heapreplace(loads, (tokens + lengths[item], items + 1, number))
    return bins


def microbatches(
    lengths: Sequence[int], max_tokens: int, *, min_count: int = 0, row: int = 1
) -> list[list[int]]:
    """Group the items into few micro-batches, each with at most `max_tokens` tokens.

    If `row` is 1, the micro-batches have similar sizes. If `row` is larger, each micro-batch needs about `row` / 2
    tokens of padding, so they are filled up to `max_tokens` one after the other, to keep their number small.

    Args:
        lengths: number of tokens of each item. Items of length 0 (see `packing.packed_length`) are left out. An item
            that is longer than `max_tokens` gets a micro-batch of its own.
        min_count: smallest number of micro-batches to return. If there are fewer items, some micro-batches are empty.
        row: the length of a micro-batch is padded to a multiple of this number.

    Returns:
        For each micro-batch, the indices of its items in ascending order.
    """
    items = [item for item, length in enumerate(lengths) if length > 0]
    sizes = [lengths[item] for item in items]
    if not items:
        groups: list[list[int]] = []
    elif row > 1:
        groups = _filled(sizes, max_tokens - max_tokens % row or max_tokens, min_count)
    else:
        groups = _even(sizes, max_tokens, min_count)
    groups += [[] for _ in range(min_count - len(groups))]
    return [[items[place] for place in group] for group in groups]


def _even(sizes: Sequence[int], max_tokens: int, min_count: int) -> list[list[int]]:
    """Return as few micro-batches of similar sizes as `max_tokens` allows."""
    num_halves = sum(
        2 * size > max_tokens for size in sizes
    )  # No two of these items fit into one micro-batch.
    fewest = max(min_count, num_halves, -(-sum(sizes) // max_tokens))
    for count in range(fewest, max(fewest, len(sizes)) + 1):
        groups: list[list[int]] = [[] for _ in range(count)]
        for place, number in enumerate(deal(sizes, count)):
            groups[number].append(place)
        if all(len(group) <= 1 or sum(sizes[place] for place in group) <= max_tokens for group in groups):
            break
    return groups


def _filled(sizes: Sequence[int], max_tokens: int, min_count: int) -> list[list[int]]:
    """Return micro-batches that are filled to `max_tokens` one after the other.

    Each micro-batch takes the longest remaining item, and then the set of other items that best fills the remaining
    room. The largest micro-batches are divided in two until there are `min_count` micro-batches.
    """
    left = sorted(range(len(sizes)), key=lambda place: (-sizes[place], place))
    groups = []
    while left:
        group, others = [left[0]], left[1:]
        room = max(0, max_tokens - sizes[left[0]])
        # Bit n of reachable[k] is set if n <= `room` and a subset of the first k items of `others` has n tokens.
        reachable = [1]
        for place in others:
            longer = (reachable[-1] << sizes[place]) & ((2 << room) - 1)
            reachable.append(reachable[-1] | longer)
        tokens = reachable[-1].bit_length() - 1
        for place, without in zip(reversed(others), reversed(reachable[:-1]), strict=True):
            if not without >> tokens & 1:
                group.append(place)
                tokens -= sizes[place]
        left = [place for place in others if place not in group]
        groups.append(sorted(group))
    while len(groups) < min(min_count, len(sizes)):
        largest = max((group for group in groups if len(group) > 1), key=lambda g: sum(sizes[p] for p in g))
        halves = deal([sizes[place] for place in largest], 2)
        groups.remove(largest)
        groups += [[p for p, dealt in zip(largest, halves, strict=True) if dealt == half] for half in (0, 1)]
    return groups
