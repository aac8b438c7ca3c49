from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from a2tgpo.batch.context_split import context_positions


@given(st.integers(2, 5), st.lists(st.integers(0, 6), min_size=1, max_size=6))
def test_split_and_gather_is_the_identity_and_every_token_is_held_once(cp_size, pieces) -> None:
    lengths = torch.tensor([2 * cp_size * size for size in pieces])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0, dtype=torch.int32)])
    total = int(lengths.sum())
    positions = context_positions(cu_seqlens, cp_size)
    assert positions.shape == (cp_size, total // cp_size)
    assert sorted(positions.flatten().tolist()) == list(range(total))
    tokens = torch.randint(0, 1000, (total,))
    parts = [tokens[own] for own in positions]
    gathered = torch.empty_like(tokens)
    gathered[positions.flatten()] = torch.cat(parts)
    assert torch.equal(gathered, tokens)


@given(st.integers(2, 4), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_every_rank_holds_as_much_of_every_segment_and_does_as_much_attention(cp_size, pieces) -> None:
    lengths = [2 * cp_size * size for size in pieces]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    for own in context_positions(cu_seqlens, cp_size):
        for start, length in zip(cu_seqlens.tolist(), lengths, strict=False):
            inside = own[(own >= start) & (own < start + length)] - start
            assert inside.numel() == length // cp_size
            # A query at position p attends to p + 1 keys.
            assert int((inside + 1).sum()) == length * (length + 1) // 2 // cp_size


def test_pieces_of_two_ranks_by_hand() -> None:
    first, second = context_positions(torch.tensor([0, 8, 12]), 2).tolist()
    assert first == [0, 1, 6, 7, 8, 11]
    assert second == [2, 3, 4, 5, 9, 10]


def test_segments_that_cannot_be_cut_are_found() -> None:
    with pytest.raises(AssertionError, match=r"segments of \[3\] tokens for 4 pieces"):
        context_positions(torch.tensor([0, 3]), 2)
