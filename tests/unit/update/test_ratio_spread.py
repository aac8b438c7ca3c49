"""How far the ratios of a mini-batch are from 1: by hand, and from the ratios of turns."""

from __future__ import annotations

import pytest
import torch
from played_step import minibatches_of

from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.config.update import UpdateConfig
from a2tgpo.loss.inputs import LossInputs
from a2tgpo.model.logprobs import MODEL_DISTRIBUTION
from a2tgpo.update.optimizer import build_optimizer
from a2tgpo.update.policy_update import compute_old_logprobs, update_policy
from a2tgpo.update.ratio_spread import spread_sums


@pytest.mark.parametrize(
    ("level", "spread", "ratios"),
    [("token", 4 + 16 + 1, 3), ("turn", 3**2 + 1, 2), ("sequence", (5 / 3) ** 2, 1)],
)
def test_each_ratio_counts_once_however_many_tokens_share_it(level, spread, ratios):
    zeros = torch.zeros(3)
    inputs = LossInputs(
        old_logprobs=zeros,
        advantages=zeros,
        clip_scale=zeros,
        weights=zeros,
        turn_ids=torch.tensor([0, 0, 2]),  # turn 1 has no token here
        sequence_ids=torch.tensor([1, 1, 1]),
        num_turns=3,
        num_sequences=2,
    )
    found = spread_sums(torch.tensor([2.0, 4.0, -1.0]), inputs, level)
    assert found["spread"] == pytest.approx(spread) and found["ratios"] == ratios


def test_the_mean_squares_are_those_of_the_turns_ratios_after_one_update_and_two(policy, trajectories):
    optimizer, schedule = build_optimizer(policy, UpdateConfig(lr=1e-3), total_steps=3)
    minibatches = minibatches_of(trajectories, policy.groups, num_minibatches=3)
    minibatches, _ = compute_old_logprobs(policy, minibatches, distribution=MODEL_DISTRIBUTION)
    metrics, turn_ratios = update_policy(
        policy, optimizer, schedule, minibatches, AlgorithmConfig(), distribution=MODEL_DISTRIBUTION
    )
    found = iter(turn_ratios)
    of_minibatches = [[next(found)[1] for _ in minibatch] for minibatch in minibatches]
    for number in (1, 2):
        ratios = torch.cat(of_minibatches[number]).double()
        expected = float(ratios.log().square().mean())
        assert expected > 0
        assert metrics.values()[f"ratio/mean_square_after_{number}"] == pytest.approx(expected, rel=1e-3)
    assert not [name for name in metrics.values() if name.endswith(("after_0", "after_3"))]
