"""Packing and micro-batches do not change any mini-batch's loss or gradients."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import get_args

import pytest
import torch
from played_step import NUM_MINIBATCHES, correct_rollouts, minibatches_of

from a2tgpo.batch.packing import PackedBatch
from a2tgpo.config.algorithm import Aggregation, AlgorithmConfig
from a2tgpo.config.correction import CorrectionConfig
from a2tgpo.loss.inputs import LossInputs
from a2tgpo.loss.policy_loss import policy_loss
from a2tgpo.trajectory import Trajectory
from a2tgpo.update.minibatch import Minibatch


def made_up_logprobs(batch: PackedBatch, shift: float) -> torch.Tensor:
    """Return log-probs [T] that depend only on the token and its place in its trajectory."""
    return -2.0 + torch.sin(0.3 * batch.targets[0] + 0.7 * batch.positions[0] + shift)


def loss_and_token_gradients(
    minibatch: Minibatch,
    corrected: list[LossInputs],
    trajectories: list[Trajectory],
    config: AlgorithmConfig,
) -> tuple[float, dict[tuple[int, int, int], float]]:
    """Return the loss, and gradients by (prompt, sample, position in the trajectory)."""
    total, gradients = 0.0, {}
    for microbatch, inputs in zip(minibatch, corrected, strict=True):
        batch = microbatch.batch
        mask = batch.loss_mask[0]
        logprobs = made_up_logprobs(batch, 0.01)[mask].requires_grad_()
        loss = policy_loss(logprobs, inputs, config).loss
        loss.backward()
        total += loss.item()
        numbers, positions = batch.sequence_ids[0, mask].tolist(), batch.positions[0, mask].tolist()
        for number, position, gradient in zip(numbers, positions, logprobs.grad.tolist(), strict=True):
            trajectory = trajectories[batch.trajectory_indices[number]]
            gradients[trajectory.prompt_index, trajectory.sample_index, position] = gradient
    return total, gradients


def outcome(
    trajectories: list[Trajectory], groups, max_tokens: int, config: AlgorithmConfig
) -> list[tuple[float, dict]]:
    """Return loss and gradients per mini-batch."""
    minibatches = minibatches_of(
        trajectories, groups, max_tokens=max_tokens, ratio=config.ratio, aggregation=config.aggregation
    )
    scored = [
        [
            replace(
                m, old_logprobs=made_up_logprobs(m.batch, 0.0), ref_logprobs=made_up_logprobs(m.batch, 0.3)
            )
            for m in minibatch
        ]
        for minibatch in minibatches
    ]
    corrected, _ = correct_rollouts(scored, config.correction, groups)
    return [
        loss_and_token_gradients(*of_one, trajectories, config)
        for of_one in zip(scored, corrected, strict=True)
    ]


@pytest.mark.parametrize("level", ["turn", "sequence", "token"])
@pytest.mark.parametrize("aggregation", get_args(Aggregation))
def test_packing_and_order_change_neither_loss_nor_gradients(
    policy, trajectories, level, aggregation
) -> None:
    """Micro-batches have one trajectory, a few, or all. Trajectories without tokens make no difference."""
    config = AlgorithmConfig(
        ratio=level,
        aggregation=aggregation,
        kl_coef=0.1,
        correction=CorrectionConfig(kind="truncate", level=level),
    )
    expected = outcome(trajectories, policy.groups, 10_000, config)
    assert len(expected) == NUM_MINIBATCHES
    num_tokens = sum(len(gradients) for _, gradients in expected)
    assert num_tokens == sum(t.num_sampled_tokens for t in trajectories)
    shuffled = random.Random(1).sample(trajectories, len(trajectories))
    with_tokens = [t for t in shuffled if t.num_sampled_tokens]
    assert len(with_tokens) < len(trajectories)
    for rollouts, max_tokens in ((trajectories, 1), (shuffled, 40), (with_tokens, 25)):
        found = outcome(rollouts, policy.groups, max_tokens, config)
        for (loss, gradients), (whole, of_whole) in zip(found, expected, strict=True):
            assert loss == pytest.approx(whole, rel=1e-6, abs=1e-6)
            assert gradients == pytest.approx(of_whole, rel=1e-5, abs=1e-8)


def test_clip_cov_chooses_the_same_tokens_in_any_packing(trajectories, policy) -> None:
    config = {"clip_cov_share": 0.2, "clip_cov_low": 0.1, "clip_cov_high": 20.0}
    found = []
    for max_tokens in (10, 40, 10_000):
        chosen = set()
        for minibatch in minibatches_of(trajectories, policy.groups, max_tokens=max_tokens, **config):
            for batch, rows in ((m.batch, m.is_cov_clipped) for m in minibatch):
                assert not (rows & ~batch.loss_mask[0]).any()
                for number, position in zip(
                    batch.sequence_ids[0, rows].tolist(), batch.positions[0, rows].tolist(), strict=True
                ):
                    chosen.add((batch.trajectory_indices[number], position))
        found.append(chosen)
    assert found[0] == found[1] == found[2]
    assert 3 < len(found[0]) < sum(t.num_sampled_tokens for t in trajectories) / 2


@pytest.mark.parametrize("max_tokens", [20, 200])
def test_offsets_add_to_the_advantages_of_their_own_tokens(policy, trajectories, max_tokens):
    offsets = [
        100.0 * row + torch.arange(t.num_sampled_tokens).double() for row, t in enumerate(trajectories)
    ]
    plain = minibatches_of(trajectories, policy.groups, max_tokens=max_tokens)
    shifted = minibatches_of(trajectories, policy.groups, max_tokens=max_tokens, token_offsets=offsets)
    seen = []
    for before, after in zip(itertools.chain(*plain), itertools.chain(*shifted), strict=True):
        added = after.token_advantages() - before.token_advantages()
        expect = [offsets[row] for row in before.batch.trajectory_indices]
        assert added.tolist() == pytest.approx(torch.cat([torch.zeros(0), *expect]).tolist(), abs=1e-2)
        seen += before.batch.trajectory_indices
    assert sorted(seen) == [row for row, t in enumerate(trajectories) if t.num_sampled_tokens]
