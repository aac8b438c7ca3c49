"""The entropy term of the loss, and the weight that keeps the entropy near a target."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import pytest
import torch
from loss_by_hand import Token, Turn, loss_inputs, new_logprobs

from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.loss.entropy import EntropyWeight
from a2tgpo.loss.policy_loss import policy_loss

ADAPTED = AlgorithmConfig(entropy_coef=5e-4, entropy_target=0.2, entropy_delta=1e-4)


def test_the_loss_subtracts_the_weighted_entropy_of_each_token() -> None:
    tokens = tuple(Token(old=-1.0, new=-0.9 - 0.1 * n, reference=-2.0, rollout=-1.0) for n in range(3))
    batch = [[[Turn(1.0, 0.0, tokens[:1])], [Turn(-1.0, 0.0, tokens[1:])]]]
    plain = loss_inputs(batch, ADAPTED)
    entropy = torch.tensor([0.3, 0.7, 1.1], dtype=torch.float64, requires_grad=True)
    inputs = dataclasses.replace(plain, entropy=entropy)
    with_entropy = policy_loss(new_logprobs(batch), inputs, ADAPTED, entropy_weight=0.01)
    without = policy_loss(new_logprobs(batch), plain, ADAPTED)
    # Two trajectories of one and two tokens, by sequence and then by token: weights 1/2, 1/4 and 1/4.
    expected = 0.01 * (0.3 / 2 + 0.7 / 4 + 1.1 / 4)
    assert (without.loss - with_entropy.loss).item() == pytest.approx(expected, rel=1e-12)
    with_entropy.loss.backward()
    assert entropy.grad is not None
    torch.testing.assert_close(entropy.grad, torch.tensor([-0.005, -0.0025, -0.0025], dtype=torch.float64))


def test_without_a_target_the_weight_is_constant() -> None:
    weight = EntropyWeight(AlgorithmConfig(entropy_coef=0.01))
    for entropy in (0.0, 5.0, math.nan):
        weight.follow(entropy)
        assert weight.value == 0.01
    assert EntropyWeight(AlgorithmConfig()).value == 0.0


def test_the_weight_rises_below_the_target_and_is_0_above_it() -> None:
    weight = EntropyWeight(ADAPTED)
    assert weight.value == 0.0, "no entropy has been measured"
    found = []
    for entropy in (0.1, 0.1, 0.2, 0.1, math.nan, *[0.1] * 5, 0.3, 0.3, 0.1):
        weight.follow(entropy)
        found.append(weight.value)
    levels = [1, 2, 0, 2, 2, 3, 4, 5, 5, 5, 0, 0, 4]
    assert found == pytest.approx([1e-4 * level for level in levels], abs=1e-12)


def test_a_restored_weight_goes_on_bit_for_bit() -> None:
    rng = random.Random(0)
    entropies = [rng.uniform(0.0, 0.4) for _ in range(40)]
    whole, part = EntropyWeight(ADAPTED), EntropyWeight(ADAPTED)
    for number, entropy in enumerate(entropies):
        whole.follow(entropy)
        part.follow(entropy)
        state = json.loads(json.dumps(part.state_dict()))
        part = EntropyWeight(ADAPTED)
        part.load_state_dict(state)
        assert part.value == whole.value, number


def test_a_restored_weight_keeps_to_a_lower_limit() -> None:
    weight = EntropyWeight(AlgorithmConfig(entropy_coef=1e-4, entropy_target=0.2))
    weight.load_state_dict({"level": 4e-4, "is_below_target": True})
    assert weight.value == 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"entropy_coef": -1.0}, "algorithm.entropy_coef is -1.0; allowed: >= 0"),
        ({"entropy_coef": 0.1, "entropy_target": -0.1}, "algorithm.entropy_target is -0.1; allowed: >= 0"),
        (
            {"entropy_target": 0.2},
            "algorithm.entropy_target is 0.2; allowed: 0 with algorithm.entropy_coef 0",
        ),
        ({"entropy_delta": 0.0}, "algorithm.entropy_delta is 0.0; allowed: > 0"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(settings, message) -> None:
    with pytest.raises(ConfigError) as error:
        AlgorithmConfig(**settings)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
