"""Ranges of flattened parameters as rectangles."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from a2tgpo.checkpoint.optimizer_shards import boxes, pieces

SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=4)


def test_a_range_is_the_end_of_a_row_whole_rows_and_the_start_of_a_row():
    assert list(boxes((4, 5), 3, 17)) == [((0, 3), (1, 2)), ((1, 0), (2, 5)), ((3, 0), (1, 2))]
    assert list(boxes((4, 5), 6, 8)) == [((1, 1), (1, 2))]
    assert list(boxes((4, 5), 0, 20)) == [((0, 0), (4, 5))]


@given(shape=SHAPES, data=st.data())
def test_rectangles_hold_the_elements_of_a_range_in_order(shape, data):
    size = math.prod(shape)
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    whole, found = torch.arange(size).view(shape), []
    for offsets, sizes in boxes(shape, start, stop):
        part = tuple(slice(first, first + count) for first, count in zip(offsets, sizes, strict=True))
        found += whole[part].flatten().tolist()
    assert found == list(range(start, stop))
    assert len(list(boxes(shape, start, stop))) <= 2 * len(shape) - 1


@given(shape=SHAPES, max_elements=st.integers(1, 40), data=st.data())
def test_pieces_are_cut_between_rows_and_none_is_larger_than_allowed(shape, max_elements, data):
    row, size = math.prod(shape[1:]), math.prod(shape)
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    cut = list(pieces(shape, start, stop, max_elements=max_elements))
    assert [left for left, _ in cut] == [start, *(right for _, right in cut[:-1])] and cut[-1][1] == stop
    assert all(right % row == 0 for _, right in cut[:-1])
    assert all(0 < right - left <= max(row, max_elements) for left, right in cut)
