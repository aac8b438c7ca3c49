"""Contrast prompts through a real policy: the right log-probs for the right tokens, and updates by their weights."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from played_step import minibatches_of

from a2tgpo.batch.packing import Alignment, pack
from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.config.update import UpdateConfig
from a2tgpo.loss.credit import credit_tokens
from a2tgpo.model.build import Policy
from a2tgpo.model.logprobs import MODEL_DISTRIBUTION
from a2tgpo.trajectory import TokenIds, Trajectory
from a2tgpo.update.contrast import compute_contrast_logprobs
from a2tgpo.update.logprobs import compute_logprobs
from a2tgpo.update.optimizer import build_optimizer
from a2tgpo.update.policy_update import compute_old_logprobs, update_policy

SETTINGS = dict(ratio="token", clip_low=0.2, clip_high=0.28, clip_beta=0.0)
GCPO = AlgorithmConfig(token_credit="gcpo", **SETTINGS)


def longer_prompts(trajectories: list[Trajectory]) -> dict[str, list[int]]:
    rng = random.Random(5)
    return {t.prompt_id: [rng.randrange(250) for _ in range(17)] for t in trajectories}


def by_trajectory(minibatches, values) -> dict[int, torch.Tensor]:
    """Return the values of each trajectory's sampled tokens. `values(microbatch)` returns a micro-batch's values,
    [n]."""
    found = {}
    for microbatch in (m for minibatch in minibatches for m in minibatch):
        batch = microbatch.batch
        ids = batch.sequence_ids[0, batch.loss_mask[0]]
        own = values(microbatch)
        found |= {index: own[ids == number] for number, index in enumerate(batch.trajectory_indices)}
    return found


def test_contrast_log_probs_are_those_of_the_same_tokens_after_the_other_prompt(policy, trajectories) -> None:
    prompts = longer_prompts(trajectories)
    weights = []
    for max_tokens in (40, 400):  # one trajectory in a micro-batch, or many
        minibatches = minibatches_of(
            trajectories, policy.groups, contrast_prompts=prompts, max_tokens=max_tokens
        )
        minibatches, _ = compute_old_logprobs(policy, minibatches, distribution=MODEL_DISTRIBUTION)
        scored = [
            compute_contrast_logprobs(policy, minibatch, distribution=MODEL_DISTRIBUTION)
            for minibatch in minibatches
        ]
        found = by_trajectory(scored, lambda m: m.contrast_logprobs)
        assert set(found) == {i for i, t in enumerate(trajectories) if t.turns}
        for index, own in found.items():
            moved = dataclasses.replace(
                trajectories[index], prompt_tokens=TokenIds(prompts[trajectories[index].prompt_id])
            )
            alone = pack([moved], [0], align=Alignment())
            (expected,) = compute_logprobs(policy, [alone], distribution=MODEL_DISTRIBUTION)
            torch.testing.assert_close(own, expected.logprobs[alone.loss_mask[0]], rtol=1e-5, atol=1e-5)

        def credited(microbatch):
            inputs = dataclasses.replace(
                microbatch.loss_inputs(), advantages=torch.ones(len(microbatch.contrast_logprobs))
            )
            sampled = microbatch.old_logprobs[microbatch.batch.loss_mask[0]]
            return credit_tokens(sampled, inputs, GCPO)[0].advantages

        weights.append(by_trajectory(scored, credited))
    for index in weights[0]:
        torch.testing.assert_close(weights[0][index], weights[1][index])


def weights_after(
    policy: Policy, trajectories: list[Trajectory], prompts: dict | None, config: AlgorithmConfig
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The model after one step of two mini-batches, and its metrics; the model then has its old weights again."""
    model = policy.gpt_models[0]
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer, schedule = build_optimizer(policy, UpdateConfig(lr=1e-3), total_steps=4)
    minibatches = minibatches_of(trajectories, policy.groups, contrast_prompts=prompts, max_tokens=400)
    minibatches, _ = compute_old_logprobs(policy, minibatches, distribution=MODEL_DISTRIBUTION)
    metrics, _ = update_policy(
        policy, optimizer, schedule, minibatches, config, distribution=MODEL_DISTRIBUTION
    )
    after = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(start[name])
    return after, metrics.values()


def test_equal_prompts_train_as_without_the_credit_to_the_bit_and_others_do_not(policy, trajectories) -> None:
    own = {t.prompt_id: list(t.prompt_tokens) for t in trajectories}
    for trajectory in trajectories:
        trajectory.prompt_tokens = TokenIds(own[trajectory.prompt_id])
    plain, of_plain = weights_after(policy, trajectories, None, AlgorithmConfig(**SETTINGS))
    equal, of_equal = weights_after(policy, trajectories, own, GCPO)
    other, of_other = weights_after(policy, trajectories, longer_prompts(trajectories), GCPO)
    assert all(torch.equal(equal[name], weight) for name, weight in plain.items())
    assert any(not torch.equal(other[name], weight) for name, weight in plain.items())
    assert not any(name.startswith("credit/") for name in of_plain)
    assert of_equal["credit/largest_weight"] == 1 and of_equal["credit/divergence"] == 0
    assert of_equal["credit/turn_1_factor"] == 1
    assert of_other["credit/largest_weight"] > 1.5 and of_other["credit/divergence"] > 0
    assert 0 < of_other["credit/turn_1_factor"] != pytest.approx(1)
