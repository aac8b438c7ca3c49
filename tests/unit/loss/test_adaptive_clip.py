from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from a2tgpo.loss.adaptive_clip import clip_scale, clipped_ratio

betas = st.floats(0, 0.999)


def scale_of(gain: float, beta: float, dtype: torch.dtype = torch.float64) -> float:
    return clip_scale(torch.tensor([gain], dtype=dtype), beta=beta).item()


@given(st.floats(-30, 30), st.floats(0.01, 0.999))
def test_the_scale_is_strictly_between_one_minus_and_one_plus_beta(gain, beta) -> None:
    assert 1 - beta < scale_of(gain, beta) < 1 + beta


@given(
    st.one_of(st.floats(), st.sampled_from([-1e300, 1e300])).filter(lambda gain: not math.isnan(gain)), betas
)
def test_no_gain_takes_the_scale_past_its_bounds(gain, beta) -> None:
    """If the sigmoid rounds to 0 or 1, the scale reaches the bound itself."""
    assert 1 - beta - 1e-15 <= scale_of(gain, beta) <= 1 + beta + 1e-15


@given(st.floats(-1e3, 1e3), st.floats(0, 1e3), betas)
def test_a_larger_gain_never_narrows_the_range(gain, more, beta) -> None:
    assert scale_of(gain + more, beta) >= scale_of(gain, beta)


@given(st.floats(-8, 8), st.floats(0.01, 8), st.floats(0.01, 0.999))
def test_a_clearly_larger_gain_widens_the_range(gain, more, beta) -> None:
    assert scale_of(gain + more, beta) > scale_of(gain, beta)


@given(st.floats(-8, 8), betas)
def test_the_scale_is_symmetric_about_one(gain, beta) -> None:
    assert scale_of(gain, beta) + scale_of(-gain, beta) == pytest.approx(2.0, abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(betas)
def test_an_exactly_zero_gain_leaves_the_range_exactly_as_it_is(dtype, beta) -> None:
    """Neutral turns are the final turn, and turns whose gain could not be computed."""
    assert scale_of(0.0, beta, dtype) == scale_of(-0.0, beta, dtype) == 1.0


def test_each_token_is_clipped_to_the_range_of_its_turn() -> None:
    """Computed by hand: 1 - 0.5 * 0.2 = 0.9 and 1 + 0.5 * 0.3 = 1.15. At c = 2 the range is 1 - 0.4 to 1 + 0.6."""
    ratio = torch.tensor([0.5, 1.0, 1.5, 0.5, 1.5, 1.7]).double()
    scale = torch.tensor([0.5, 0.5, 0.5, 2.0, 2.0, 2.0]).double()
    bounded = clipped_ratio(ratio, scale, clip_low=0.2, clip_high=0.3)
    torch.testing.assert_close(bounded, torch.tensor([0.9, 1.0, 1.15, 0.6, 1.5, 1.6]).double())
