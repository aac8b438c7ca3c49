from __future__ import annotations

import math

import torch

from a2tgpo.loss.turn_ratio import segment_mean, shared_log_ratio


def test_a_token_of_a_turn_gets_its_share_of_the_ratio_gradient() -> None:
    logprobs = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    ratio = shared_log_ratio(logprobs, torch.full((4,), -0.1).double(), torch.tensor([0, 0, 0, 1]), 2).exp()
    (gradient,) = torch.autograd.grad(ratio[0], logprobs)
    expect = math.exp(0.1) / 3
    torch.testing.assert_close(gradient, torch.tensor([expect, expect, expect, 0.0]).double())


def test_tokens_of_a_segment_need_not_stand_together() -> None:
    values = torch.tensor([1.0, 10.0, 3.0, 20.0])
    assert segment_mean(values, torch.tensor([2, 0, 2, 0]), 3).tolist() == [15.0, 0.0, 2.0]


def test_the_mean_is_bounded_and_not_the_tokens() -> None:
    """Log-ratios of 30 and -28 have mean 1. Log-ratios of 50 and -2 have mean 24, which is cut to 10 and has no
    gradient.
    """
    ids = torch.tensor([0, 0, 1, 1])
    logprobs = torch.tensor([30.0, -28.0, 50.0, -2.0], dtype=torch.float64, requires_grad=True)
    found = shared_log_ratio(logprobs, torch.zeros(4).double(), ids, 2)
    assert found.tolist() == [1.0, 1.0, 10.0, 10.0]
    (gradient,) = torch.autograd.grad(found.sum(), logprobs)
    assert gradient.tolist() == [1.0, 1.0, 0.0, 0.0]
