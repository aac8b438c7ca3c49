"""APPO's token credit against plain loops in float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.config.future import FutureConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.loss.credit import credit_tokens
from a2tgpo.loss.credits.appo import discounted_sums
from a2tgpo.loss.inputs import LossInputs
from a2tgpo.loss.policy_loss import policy_loss

APPO = AlgorithmConfig(
    token_credit="appo", ratio="token", clip_low=0.2, clip_high=0.28, clip_beta=0.0, dual_clip=3.0
)
NO_LIMIT = dataclasses.replace(APPO, dual_clip=0.0)

Token = tuple[float, float]
"""A token's log ratio and its advantage."""
tokens = st.tuples(st.floats(-4, 4) | st.sampled_from([0.0, math.log(3)]), st.sampled_from([-1.5, 0.0, 2.0]))
batches = st.lists(st.lists(tokens, max_size=9), min_size=1, max_size=4)
futures = st.builds(
    FutureConfig,
    half_life=st.sampled_from([0.01, 1.0, 3.0, 64.0]),
    upper=st.sampled_from([0.0, 0.2, 5.0]),
    weight=st.sampled_from([0.0, 0.5, 1.0]),
)


def inputs_of(
    batch: list[list[Token]], dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, LossInputs]:
    rows = [(number, *token) for number, sequence in enumerate(batch) for token in sequence]
    old = torch.full((len(rows),), -1.0, dtype=dtype)
    sequence_ids = torch.tensor([number for number, _, _ in rows], dtype=torch.int64)
    inputs = LossInputs(
        old_logprobs=old,
        advantages=torch.tensor([advantage for _, _, advantage in rows], dtype=dtype),
        clip_scale=torch.ones(len(rows), dtype=dtype),
        weights=torch.ones(len(rows), dtype=dtype),
        turn_ids=sequence_ids,
        sequence_ids=sequence_ids,
        num_turns=len(batch),
        num_sequences=len(batch),
    )
    return old + torch.tensor([ratio for _, ratio, _ in rows], dtype=dtype), inputs


def loop_factors(batch: list[list[Token]], config: AlgorithmConfig) -> list[float]:
    """Return 1 + weight f of each token, by two loops over each trajectory."""
    future, limit = config.future, config.dual_clip or math.inf
    factors = []
    for sequence in batch:
        logs = [(-1.0 + ratio) + 1.0 for ratio, _ in sequence]  # rounded as the log-probs are
        for k, (_, advantage) in enumerate(sequence):
            total = 0.0
            for j in range(k, len(sequence)):
                if logs[j] <= math.log(limit):
                    total += 2.0 ** (-(j - k) / future.half_life) * logs[j]
            f = min(max(math.exp(total), 1.0), 1.0 + future.upper)
            if advantage < 0 and logs[k] > math.log(6.0):
                f = min(max(math.exp(total), 0.8), 1.0)
            factors.append(1.0 + future.weight * f)
    return factors


@settings(max_examples=200)
@given(batches, futures, st.sampled_from([APPO, NO_LIMIT]))
def test_factors_equal_the_double_loop_over_each_trajectory(batch, future, config):
    config = dataclasses.replace(config, future=future)
    logprobs, inputs = inputs_of(batch)
    found, _ = credit_tokens(logprobs, inputs, config)
    factors = loop_factors(batch, config)
    expected = [advantage * f for advantage, f in zip(inputs.advantages.tolist(), factors, strict=True)]
    assert found.advantages.tolist() == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_sums_over_a_long_response_equal_the_loop_from_its_end():
    values = torch.randn(6192, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gamma, expected = 0.5 ** (1 / 64), [0.0]
    for value in reversed(values.tolist()):
        expected.append(value + gamma * expected[-1])
    found = discounted_sums(values, torch.zeros(6192, dtype=torch.int64), gamma=gamma)
    assert found.tolist() == pytest.approx(expected[:0:-1], rel=0, abs=1e-10)


def test_before_an_update_the_credit_is_a_constant_factor_of_two():
    logprobs, inputs = inputs_of([[(0.0, 1.0), (0.0, 1.0)], [(0.0, -1.5)]])
    found, measured = credit_tokens(logprobs, inputs, APPO)
    assert torch.equal(found.advantages, 2 * inputs.advantages)
    assert measured["influence"].tolist() == [1.0] * 3
    assert not measured["capped_share"].any() and not measured["dropped_share"].any()


def test_the_credit_has_no_gradient():
    logprobs, inputs = inputs_of([[(0.01, 1.0), (0.02, 1.0), (-0.01, 1.0)]])
    logprobs.requires_grad_()
    credited, _ = credit_tokens(logprobs, inputs, APPO)
    policy_loss(logprobs, credited, APPO).loss.backward()
    ratio = (logprobs.detach() - inputs.old_logprobs).exp()
    assert torch.allclose(logprobs.grad, -credited.advantages * ratio, rtol=1e-12)


def test_a_token_without_a_finite_ratio_influences_no_token():
    logprobs, inputs = inputs_of([[(0.1, 1.0), (-math.inf, 1.0), (0.2, 1.0)]])
    found, measured = credit_tokens(logprobs, inputs, dataclasses.replace(APPO, future=FutureConfig(upper=5)))
    assert found.advantages.isfinite().all()
    assert measured["dropped_share"].tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("name", "value"), [("half_life", 0.0), ("upper", -0.1), ("weight", -1.0)], ids=lambda v: str(v)
)
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=rf"algorithm\.future\.{name} is {value}; allowed: >"):
        FutureConfig(**{name: value})
