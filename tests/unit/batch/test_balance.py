from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from a2tgpo.batch.balance import deal, microbatches

lengths_lists = st.lists(st.integers(0, 50), max_size=40)


def test_longest_items_are_dealt_first() -> None:
    assert deal([1, 5, 4, 2], 2) == [0, 0, 1, 1]  # 5+1 and 4+2


def test_dealing_is_the_same_on_every_call_and_keeps_ties_in_order() -> None:
    assert deal([3, 3, 3, 3, 3], 3) == [0, 1, 2, 0, 1]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(1, 8))
def test_no_bin_exceeds_the_average_by_more_than_one_item(lengths, num_bins) -> None:
    loads = [0] * num_bins
    for length, number in zip(lengths, deal(lengths, num_bins), strict=True):
        loads[number] += length
    assert max(loads) <= sum(lengths) / num_bins + max(lengths)


@given(lengths_lists, st.integers(1, 60), st.integers(1, 6), st.sampled_from([1, 8]))
def test_every_item_with_tokens_is_in_exactly_one_microbatch_within_the_limit(
    lengths, max_tokens, min_count, row
) -> None:
    groups = microbatches(lengths, max_tokens, min_count=min_count, row=row)
    assert sorted(item for group in groups for item in group) == [
        item for item, length in enumerate(lengths) if length
    ]
    assert len(groups) >= min_count
    for group in groups:
        assert group == sorted(group)
        assert len(group) <= 1 or sum(lengths[item] for item in group) <= max_tokens


def test_microbatches_are_few_and_even() -> None:
    groups = microbatches([10] * 12, 40)
    assert [len(group) for group in groups] == [4, 4, 4]


def test_rows_that_are_padded_are_filled() -> None:
    # 8 is packed with 2, not with 1, and then 5 with 3 and 1, so only the last row is padded.
    assert microbatches([8, 5, 1, 3, 2, 1, 4], 10, row=5) == [[0, 4], [1, 2, 6], [3, 5]]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(2, 5))
def test_a_filled_row_leaves_no_room_that_another_choice_would_use(lengths, row) -> None:
    limit = 3 * row
    left = list(range(len(lengths)))
    for group in microbatches(lengths, limit, row=row):
        longest = max(left, key=lambda item: (lengths[item], -item))
        assert longest in group
        others = [lengths[item] for item in left if item != longest]
        sums = {sum(chosen) for n in range(len(others) + 1) for chosen in combinations(others, n)}
        room = limit - lengths[longest]
        assert sum(lengths[item] for item in group) - lengths[longest] == max(
            (total for total in sums if total <= room), default=0
        )
        left = [item for item in left if item not in group]
    assert not left


def test_an_item_past_the_limit_gets_a_microbatch_of_its_own() -> None:
    assert [0] in microbatches([100, 5, 5], 20)


def test_a_rank_without_items_returns_as_many_empty_microbatches_as_asked() -> None:
    assert microbatches([], 10, min_count=2) == [[], []]
    assert microbatches([0, 0], 10) == []
