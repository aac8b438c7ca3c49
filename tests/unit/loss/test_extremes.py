"""Loss and gradients stay finite for all values that a bad update or a bad engine may cause."""

from __future__ import annotations

import itertools

import pytest
import torch
from loss_by_hand import Token, Turn, loss_and_gradient

from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.config.correction import CorrectionConfig

EXTREMES = [
    [[Turn(sign * advantage, gain, (Token(old, old + change, reference, rollout),))]]
    for sign, advantage, gain, old, change, reference, rollout in itertools.product(
        (-1, 1), (1e-6, 1e6), (-1e6, 0.0, 1e6), (-1e4, -1e3, 0.0), (-1e3, 0.0, 1e3), (-1e4, 0.0), (-1e4, 0.0)
    )
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ratio", ["turn", "sequence", "token"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_extreme_values_give_finite_loss_and_gradients(dtype, ratio, estimator) -> None:
    """All values are in one batch, so that a value that is not finite in any trajectory would reach the sum."""
    for kind, dual_clip in (("none", 0.0), ("truncate", 3.0), ("mask", 0.0)):
        config = AlgorithmConfig(
            ratio=ratio,
            dual_clip=dual_clip if ratio == "token" else 0.0,
            kl_coef=1e-3,
            kl_estimator=estimator,
            correction=CorrectionConfig(kind=kind, level=ratio),
        )
        result, gradient = loss_and_gradient(EXTREMES, config, dtype)
        assert result.loss.isfinite() and gradient.isfinite().all()
        assert result.ratio.isfinite().all() and result.token_loss.isfinite().all()
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("ratio", ["turn", "sequence", "token"])
def test_turns_of_thousands_of_tokens_lose_no_precision_in_float32(ratio) -> None:
    """The same trajectory also has a turn of one token."""
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(6000, generator=generator).double() * 20
    new = old + 0.1 * torch.randn(6000, generator=generator).double()
    long = tuple(Token(o, n, o, o) for o, n in zip(old.float().tolist(), new.float().tolist(), strict=True))
    batch = [[[Turn(1.5, 0.7, long), Turn(-2.0, 0.0, (Token(-1.0, -1.2, -1.0, -1.0),))]]]
    config = AlgorithmConfig(ratio=ratio, clip_low=0.2, clip_high=0.28)
    result, gradient = loss_and_gradient(batch, config, torch.float32)
    exact, exact_gradient = loss_and_gradient(batch, config, torch.float64)
    torch.testing.assert_close(result.loss.double(), exact.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-4, atol=1e-9)
