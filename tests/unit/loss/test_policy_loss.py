"""The loss and its gradient equal those of objectives written by hand (loss_by_hand.py) for all combinations of
options.
"""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_by_hand import (
    LEVELS,
    Token,
    Turn,
    batches,
    configs,
    loss_and_gradient,
    loss_inputs,
    naive_loss_and_gradient,
    new_logprobs,
)

from a2tgpo.config.algorithm import Aggregation, AlgorithmConfig
from a2tgpo.config.correction import CorrectionConfig
from a2tgpo.loss.policy_loss import policy_loss


@settings(max_examples=400)
@given(batches, configs())
def test_loss_and_gradient_equal_the_objectives_written_by_hand(batch, config) -> None:
    result, gradient = loss_and_gradient(batch, config)
    expected, expected_gradient = naive_loss_and_gradient(batch, config)
    assert result.loss.item() == pytest.approx(expected, rel=1e-11, abs=1e-11)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


@settings(max_examples=60)
@given(batches, st.sampled_from(LEVELS), st.sampled_from(get_args(Aggregation)))
def test_at_the_old_policy_the_gradient_is_that_of_reinforce(batch, ratio, aggregation) -> None:
    """The gradient is the token's -w A, or the mean of -w A over the tokens that share its ratio."""
    still = [
        [
            [
                dataclasses.replace(t, tokens=tuple(dataclasses.replace(k, new=k.old) for k in t.tokens))
                for t in rollout
            ]
            for rollout in prompt
        ]
        for prompt in batch
    ]
    config = AlgorithmConfig(ratio=ratio, aggregation=aggregation)
    result, gradient = loss_and_gradient(still, config)
    inputs = loss_inputs(still, config)
    assert (result.ratio == 1).all() and not result.is_clipped.any()
    pull = -inputs.weights * inputs.advantages
    ids = {"turn": inputs.turn_ids, "sequence": inputs.sequence_ids, "token": torch.arange(pull.numel())}
    expected = [float(pull[ids[ratio] == own].mean()) for own in ids[ratio].tolist()]
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


@settings(max_examples=60)
@given(batches, configs(), st.data())
def test_a_trajectory_without_sampled_tokens_contributes_nothing(batch, config, data) -> None:
    """Such a trajectory is not counted in the divisor either."""
    result, gradient = loss_and_gradient(batch, config)
    empty = data.draw(st.sampled_from([[], [Turn(2.0, 1.0, ())], [Turn(-1.0, 0.0, ())] * 3]))
    prompt = data.draw(st.integers(0, len(batch) - 1))
    place = data.draw(st.integers(0, len(batch[prompt])))
    padded = [list(rollouts) for rollouts in batch]
    padded[prompt].insert(place, empty)
    padded_result, padded_gradient = loss_and_gradient(padded, config)
    assert padded_result.loss.item() == result.loss.item()
    assert torch.equal(padded_gradient, gradient)


def test_importance_scales_the_policy_term_and_not_the_kl() -> None:
    batch = [[[Turn(1.0, 0.0, (Token(old=-1.0, new=-1.0, reference=-2.0, rollout=-1.0),))]]]
    config = AlgorithmConfig(kl_coef=0.5, kl_estimator="k1")
    inputs = dataclasses.replace(loss_inputs(batch, config), importance=torch.tensor([0.25]).double())
    result = policy_loss(new_logprobs(batch), inputs, config)
    assert result.loss.item() == pytest.approx(-1.0 * 0.25 + 0.5 * 1.0)
    assert result.token_loss.tolist() == [-1.0]


def test_an_empty_microbatch_has_a_zero_loss_with_a_gradient() -> None:
    for correction in (CorrectionConfig(), CorrectionConfig(kind="mask", level="turn")):
        result, gradient = loss_and_gradient([[[]]], AlgorithmConfig(kl_coef=0.1, correction=correction))
        assert result.loss.item() == 0.0 and gradient.shape == (0,)
