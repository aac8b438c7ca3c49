"""DAPO's Eq. 13 piece by piece, and properties that are true for all lengths."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2tgpo.reward.overlong import overlong_penalty

LIMITS = st.integers(2, 8000).flatmap(lambda limit: st.tuples(st.just(limit), st.integers(1, limit - 1)))


def equation_13(length: int, limit: int, buffer: int) -> float:
    """As printed in arXiv 2503.14476, with L_max = limit and L_cache = buffer."""
    if length <= limit - buffer:
        return 0.0
    if length <= limit:
        return ((limit - buffer) - length) / buffer
    return -1.0


def test_the_papers_run_loses_half_at_the_middle_of_the_buffer():
    paper = dict(max_tokens=20480, buffer_tokens=4096, penalty=1.0)
    lengths = (0, 16384, 16385, 18432, 20480, 20481)
    expected = (0.0, 0.0, -1 / 4096, -0.5, -1.0, -1.0)
    assert [overlong_penalty(n, **paper) for n in lengths] == pytest.approx(expected)


@given(LIMITS, st.integers(0, 10_000), st.floats(0, 5))
def test_it_is_equation_13_scaled(limits, length, penalty):
    limit, buffer = limits
    found = overlong_penalty(length, max_tokens=limit, buffer_tokens=buffer, penalty=penalty)
    assert found == pytest.approx(penalty * equation_13(length, limit, buffer), abs=1e-12)


@given(LIMITS, st.lists(st.integers(0, 10_000), min_size=2), st.floats(0, 5))
def test_it_only_falls_with_length_and_stays_within_the_penalty(limits, lengths, penalty):
    limit, buffer = limits
    added = [
        overlong_penalty(length, max_tokens=limit, buffer_tokens=buffer, penalty=penalty)
        for length in sorted(lengths)
    ]
    assert added == sorted(added, reverse=True)
    assert all(-penalty <= value <= 0 for value in added)
    assert all(
        value == 0 for length, value in zip(sorted(lengths), added, strict=True) if length <= limit - buffer
    )


def test_without_a_buffer_no_length_is_penalised():
    assert overlong_penalty(9999, max_tokens=100, buffer_tokens=0, penalty=1.0) == 0.0
