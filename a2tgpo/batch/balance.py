"""Load balancing: trajectories over data-parallel replicas, and a replica's trajectories over micro-batches.

Both results depend only on the lengths, so all ranks that know the lengths compute the same result.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def deal(lengths: Sequence[int], num_bins: int) -> list[int]:
    """Assign each item to a bin so that the bins have similar total lengths.

    Goes from the longest item to the shortest, and gives each to the bin with the fewest tokens so far (the largest
    bin is within 4/3 of the optimum, and far closer with many items). Ties go to the earlier item and the lower bin.

    Args:
        lengths: tokens of each item.
        num_bins: >= 1.

    Returns:
        The bin of each item, in [0, num_bins).
    """
    assert num_bins >= 1, f"num_bins is {num_bins}; at least one bin is needed"
    loads = [(0, 0, number) for number in range(num_bins)]  # (tokens, items, bin): a sorted list is a heap
    bins = [0] * len(lengths)
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        tokens, items, number = loads[0]
        bins[item] = number
        heapq.heapreplace(loads, (tokens + lengths[item], items + 1, number))
    return bins


def microbatches(
    lengths: Sequence[int], max_tokens: int, *, min_count: int = 0, row: int = 1
) -> list[list[int]]:
    """Group items into few micro-batches of near-equal size, at most `max_tokens` each.

    If rows are padded to a multiple, equal sizes would waste about half a multiple per row. Micro-batches are then
    filled to the limit, one after the other, and the last ones are smaller.

    Items of length 0 (see `packing.packed_length`) are left out. An item longer than `max_tokens` gets its own
    micro-batch.

    Args:
        lengths: tokens of each item.
        max_tokens: limit of one micro-batch.
        min_count: fewest micro-batches to return; more micro-batches than items leave some of them empty.
        row: the length of a micro-batch is padded to a multiple of this number.

    Returns:
        Indices of the items of each micro-batch, ascending within it; without items, `min_count` empty micro-batches.
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
    """Return micro-batches of near-equal size, as few as `deal` can make."""
    num_halves = sum(2 * size > max_tokens for size in sizes)  # no two of these items fit together
    fewest = max(min_count, num_halves, -(-sum(sizes) // max_tokens))
    for count in range(fewest, max(fewest, len(sizes)) + 1):
        groups: list[list[int]] = [[] for _ in range(count)]
        for place, number in enumerate(deal(sizes, count)):
            groups[number].append(place)
        if all(len(group) <= 1 or sum(sizes[place] for place in group) <= max_tokens for group in groups):
            break
    return groups


def _filled(sizes: Sequence[int], max_tokens: int, min_count: int) -> list[list[int]]:
    """Repeatedly combine the longest remaining item with the other items that best fill `max_tokens`.

    If this makes fewer than `min_count` micro-batches, the largest ones are halved.
    """
    left = sorted(range(len(sizes)), key=lambda place: (-sizes[place], place))
    groups = []
    while left:
        group, others = [left[0]], left[1:]
        room = max(0, max_tokens - sizes[left[0]])
        # Bit n of reachable[k] is set if some subset of the first k others has n <= `room` tokens in total.
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
