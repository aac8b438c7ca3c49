"""Clip-Cov: which tokens it chooses, and which gradients these tokens lose."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from loss_by_hand import Token, Turn, loss_inputs, new_logprobs

from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.loss.clip_cov import clip_covariance
from a2tgpo.loss.policy_loss import policy_loss


def choose(
    logprobs: list[float], advantages: list[float], draws: list[float], **settings: float
) -> list[bool]:
    tensors = [torch.tensor(values, dtype=torch.float64) for values in (logprobs, advantages, draws)]
    return clip_covariance(*tensors, config=AlgorithmConfig(**settings), dp_group=None).tolist()


def test_tokens_of_the_band_are_chosen_by_their_draws() -> None:
    # The means are -2 and 0.5, so the covariances are 4, 4, -2, -2 and 0.
    logprobs, advantages = [0.0, -4.0, 0.0, -4.0, -2.0], [2.5, -1.5, -0.5, 1.5, 0.5]
    for share, draws, expected in (
        (0.2, [0.4, 0.6, 0.0, 0.0, 0.0], [True, False, False, False, False]),
        (0.2, [0.6, 0.4, 0.0, 0.0, 0.0], [False, True, False, False, False]),
        (0.4, [0.9, 0.9, 0.9, 0.9, 0.9], [True, True, False, False, False]),
    ):
        assert choose(logprobs, advantages, draws, clip_cov_share=share) == expected
    assert not any(choose(logprobs, advantages, [0.0] * 5, clip_cov_share=0.4, clip_cov_high=3.0))
    assert not any(choose(logprobs, advantages, [0.0] * 5, clip_cov_share=0.4, clip_cov_low=4.5))


def test_the_chosen_share_of_all_tokens_is_right_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs, advantages = torch.randn(2, 200_000, generator=generator, dtype=torch.float64)
    draws = torch.rand(200_000, generator=generator, dtype=torch.float64)
    config = AlgorithmConfig(clip_cov_share=0.01)
    chosen = clip_covariance(logprobs, advantages, draws, config=config, dp_group=None)
    assert chosen.double().mean().item() == pytest.approx(0.01, rel=0.1)


def test_a_log_prob_that_is_not_finite_is_not_chosen_and_moves_no_mean() -> None:
    logprobs, advantages = (
        [0.0, -4.0, 0.0, -4.0, -2.0, math.nan, -math.inf],
        [2.5, -1.5, -0.5, 1.5, 0.5, 9.0, 9.0],
    )
    assert choose(logprobs, advantages, [0.4, 0.6, 0, 0, 0, 0, 0], clip_cov_share=0.2) == [True] + 6 * [False]


def test_no_token_at_all_is_no_error() -> None:
    assert choose([], [], [], clip_cov_share=0.2) == []


@pytest.mark.parametrize("ratio", ["turn", "sequence", "token"])
def test_a_chosen_token_gets_no_gradient_and_the_loss_keeps_its_value(ratio) -> None:
    tokens = tuple(Token(old=-1.0, new=-1.001 + 0.001 * n, reference=-2.0, rollout=-1.0) for n in range(3))
    batch = [[[Turn(1.0, 0.0, tokens)]]]
    config = AlgorithmConfig(ratio=ratio, clip_low=0.2, clip_high=0.2)
    plain, inputs = new_logprobs(batch), loss_inputs(batch, config)
    expected = policy_loss(plain, inputs, config)
    expected.loss.backward()
    found = new_logprobs(batch)
    chosen = torch.tensor([False, True, False])
    result = policy_loss(found, dataclasses.replace(inputs, is_cov_clipped=chosen), config)
    result.loss.backward()
    assert result.loss.item() == expected.loss.item()
    assert found.grad is not None and plain.grad is not None and plain.grad.all()
    assert torch.equal(found.grad, plain.grad.where(~chosen, 0.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_cov_share": 1.0}, "algorithm.clip_cov_share is 1.0; allowed: in [0, 1)"),
        (
            {"clip_cov_low": 6.0},
            "algorithm.clip_cov_low is 6.0; allowed: > 0 and below algorithm.clip_cov_high (5)",
        ),
    ],
)
def test_impossible_settings_are_refused_in_one_line(settings, message) -> None:
    with pytest.raises(ConfigError) as error:
        AlgorithmConfig(**settings)
    assert str(error.value) == message
