"""The loss of a mini-batch is the sum of the losses of its parts, however micro-batches or replicas divide it."""

from __future__ import annotations

import dataclasses
import random
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_by_hand import LEVELS, Batch, Token, Turn, batches, configs, loss_inputs, new_logprobs

from a2tgpo.config.algorithm import Aggregation, AlgorithmConfig
from a2tgpo.config.correction import CorrectionConfig
from a2tgpo.loss.inputs import LossInputs
from a2tgpo.loss.policy_loss import policy_loss


def take(inputs: LossInputs, logprobs: torch.Tensor, sequences: list[int]) -> tuple[LossInputs, torch.Tensor]:
    """Return the micro-batch of these trajectories in this order, with turns and sequences numbered from 0."""
    rows = torch.cat(
        [torch.nonzero(inputs.sequence_ids == number)[:, 0] for number in sequences]
        or [torch.zeros(0, dtype=torch.int64)]
    )
    renumbered = {}
    for name, count in (("turn_ids", "num_turns"), ("sequence_ids", "num_sequences")):
        found = getattr(inputs, name)[rows].tolist()
        order = {old: new for new, old in enumerate(dict.fromkeys(found))}
        renumbered[name] = torch.tensor([order[old] for old in found], dtype=torch.int64)
        renumbered[count] = len(order)
    per_token = {
        field.name: getattr(inputs, field.name)[rows]
        for field in dataclasses.fields(inputs)
        if field.name not in renumbered and getattr(inputs, field.name) is not None
    }
    return LossInputs(**per_token, **renumbered), logprobs[rows]


def whole_and_parts(
    batch: Batch, config: AlgorithmConfig, parts: list[list[int]], dtype: torch.dtype
) -> list[tuple[float, torch.Tensor]]:
    """Return loss and gradient of the whole batch, and the sums of both over `parts` of its trajectories."""
    inputs, found = loss_inputs(batch, config, dtype), []
    for groups in ([list(range(inputs.num_sequences))], parts):
        logprobs, total = new_logprobs(batch, dtype), 0.0
        for sequences in groups:
            part, of_part = take(inputs, logprobs, sequences)
            loss = policy_loss(of_part, part, config).loss
            loss.backward()
            total += loss.item()
        assert logprobs.grad is not None
        found.append((total, logprobs.grad))
    return found


def dealt(num_sequences: int, num_parts: int, rng: random.Random) -> list[list[int]]:
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    for number in rng.sample(range(num_sequences), num_sequences):
        parts[rng.randrange(num_parts)].append(number)
    return parts


@settings(max_examples=150)
@given(batches, configs(), st.integers(1, 6), st.randoms())
def test_any_partition_in_any_order_gives_the_whole_in_float64(batch, config, num_parts, rng) -> None:
    parts = dealt(sum(len(prompt) for prompt in batch), num_parts, rng)
    (whole, gradient), (added, added_gradient) = whole_and_parts(batch, config, parts, torch.float64)
    scale = max(1.0, float(policy_terms(batch, config).sum()))
    assert added == pytest.approx(whole, rel=1e-12, abs=1e-12 * scale)
    torch.testing.assert_close(added_gradient, gradient, rtol=1e-12, atol=1e-15)


def policy_terms(batch: Batch, config: AlgorithmConfig) -> torch.Tensor:
    """Return the absolute values of the loss's terms. Terms of opposite signs cancel, but their rounding errors do
    not.
    """
    inputs = loss_inputs(batch, config)
    result = policy_loss(new_logprobs(batch), inputs, config)
    importance = 1.0 if inputs.importance is None else inputs.importance
    return inputs.weights * ((importance * result.token_loss).abs() + config.kl_coef * result.kl.abs())


def realistic_batch(rng: random.Random) -> Batch:
    """Return 8 prompts of 4 rollouts with up to 7 turns of up to 60 tokens. Log-ratios are as after a few updates."""

    def token() -> Token:
        old = -rng.expovariate(3.0)
        return Token(old, old + rng.gauss(0, 0.05), old + rng.gauss(0, 0.2), old + rng.gauss(0, 0.02))

    def turn() -> Turn:
        tokens = tuple(token() for _ in range(rng.randrange(61)))
        return Turn(rng.gauss(0, 1.5), rng.gauss(0, 1), tokens)

    return [[[turn() for _ in range(rng.randint(1, 7))] for _ in range(4)] for _ in range(8)]


@pytest.mark.parametrize("ratio", LEVELS)
@pytest.mark.parametrize("aggregation", get_args(Aggregation))
def test_any_partition_gives_the_whole_in_float32(ratio, aggregation) -> None:
    rng = random.Random(ratio + aggregation)
    batch = realistic_batch(rng)
    correction = CorrectionConfig(kind="truncate", level=ratio)
    config = AlgorithmConfig(ratio=ratio, aggregation=aggregation, kl_coef=1e-3, correction=correction)
    scale = float(policy_terms(batch, config).sum())
    for num_parts in (2, 5, 32):
        parts = dealt(32, num_parts, rng)
        (whole, gradient), (added, added_gradient) = whole_and_parts(batch, config, parts, torch.float32)
        assert abs(added - whole) <= 1e-6 * scale
        torch.testing.assert_close(
            added_gradient, gradient, rtol=1e-6, atol=1e-6 * float(gradient.abs().max())
        )
