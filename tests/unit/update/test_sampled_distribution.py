"""Training uses the distribution that tokens were sampled from: softmax(logits / temperature) over the tokenizer's
ids.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from played_step import minibatches_of
from transformers import AutoModelForCausalLM

from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.config.update import UpdateConfig
from a2tgpo.loss.inputs import LossInputs
from a2tgpo.loss.policy_loss import policy_loss
from a2tgpo.model.logprobs import MODEL_DISTRIBUTION, TokenDistribution, token_logprobs
from a2tgpo.trajectory import Trajectory
from a2tgpo.update.optimizer import build_optimizer
from a2tgpo.update.policy_update import compute_old_logprobs, compute_ref_logprobs, update_policy

NUM_IDS = 200
"""The vocabulary has 250 ids. The other 50 are padding that the engine never samples."""
COOL = TokenDistribution(temperature=0.7, num_ids=NUM_IDS)


@pytest.fixture
def sampled(trajectories: list[Trajectory]) -> list[Trajectory]:
    """Return the step's trajectories without tokens that no engine could have sampled."""
    for trajectory in trajectories:
        for turn in trajectory.turns:
            turn.tokens = [token % NUM_IDS for token in turn.tokens]
    return trajectories


def expected_scores(path: str, trajectory: Trajectory) -> list[tuple[float, float]]:
    """Return (log-prob, entropy) of each sampled token from transformers in float64."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    with torch.no_grad():
        logits = model(torch.tensor([trajectory.tokens])).logits[0, :, :NUM_IDS] / COOL.temperature
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    found, position = [], len(trajectory.prompt_tokens)
    for turn in trajectory.turns:
        rows = range(position - 1, position - 1 + len(turn.tokens))
        found += [
            (float(logprobs[row, token]), float(entropy[row]))
            for row, token in zip(rows, turn.tokens, strict=True)
        ]
        position += len(turn.tokens) + len(turn.observation_tokens)
    return found


def test_policy_and_reference_are_scored_in_the_sampled_distribution(policy, sampled) -> None:
    minibatches, metrics = compute_old_logprobs(
        policy, minibatches_of(sampled, policy.groups), distribution=COOL
    )
    minibatches = compute_ref_logprobs(policy, minibatches, distribution=COOL)
    expected = {index: expected_scores(policy.path, t) for index, t in enumerate(sampled) if t.turns}
    for minibatch in minibatches:
        for microbatch in minibatch:
            batch = microbatch.batch
            for place, index in enumerate(batch.trajectory_indices):
                rows = (batch.sequence_ids[0] == place) & batch.loss_mask[0]
                logprobs = torch.tensor([logprob for logprob, _ in expected[index]])
                torch.testing.assert_close(microbatch.old_logprobs[rows], logprobs, atol=1e-4, rtol=0)
                torch.testing.assert_close(microbatch.ref_logprobs[rows], logprobs, atol=1e-4, rtol=0)
    scores = list(itertools.chain.from_iterable(expected.values()))
    assert metrics.values()["likelihood/mean"] == pytest.approx(sum(p for p, _ in scores) / len(scores), 1e-4)
    assert metrics.values()["entropy/mean"] == pytest.approx(sum(h for _, h in scores) / len(scores), 1e-4)


@pytest.mark.parametrize("num_minibatches", [1, 2])
def test_the_training_pass_sees_the_distribution_that_scoring_saw(policy, sampled, num_minibatches) -> None:
    minibatches = minibatches_of(sampled, policy.groups, num_minibatches=num_minibatches)
    minibatches, _ = compute_old_logprobs(policy, minibatches, distribution=COOL)
    minibatches = compute_ref_logprobs(policy, minibatches, distribution=COOL)
    optimizer, schedule = build_optimizer(policy, UpdateConfig(lr=1e-6), total_steps=4)
    config = AlgorithmConfig(kl_coef=0.1)
    metrics, _ = update_policy(policy, optimizer, schedule, minibatches[:1], config, distribution=COOL)
    assert abs(metrics.values()["kl/old_policy"]) < 1e-5
    assert abs(metrics.values()["kl/reference"]) < 1e-5
    warm, _ = update_policy(
        policy, optimizer, schedule, minibatches[:1], config, distribution=MODEL_DISTRIBUTION
    )
    assert warm.values()["kl/reference"] > 1e-2, "another temperature is another distribution"


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.4])
def test_a_decision_that_does_not_matter_has_an_expected_gradient_of_0(policy, temperature) -> None:
    """The first of two decisions is the reward, and the second has no effect. All four trajectories are listed, not
    sampled.
    """
    start = torch.tensor([[0.0, -1.0], [0.0, 0.5], [0.0, 0.5]], dtype=torch.float64)
    gradients = {}
    for trained_at in {temperature, 1.0}:
        logits = start.clone().requires_grad_()  # first decision, then the second after either first
        sampled_logprobs = (start / temperature).log_softmax(-1)
        share = sampled_logprobs[0].exp()  # probabilities of first decision 0 and 1
        rows, targets, advantages, weights = [], [], [], []
        for first, second in itertools.product((0, 1), (0, 1)):
            probability = (sampled_logprobs[0, first] + sampled_logprobs[1 + first, second]).exp()
            rows += [0, 1 + first]
            targets += [first, second]
            advantages += 2 * [(first - share[1]) / share.prod().sqrt()]
            weights += 2 * [probability]
        logprobs, _ = token_logprobs(
            logits[rows],
            torch.tensor(targets),
            vocab_size=2,
            tp_group=policy.groups.tp_group,
            temperature=trained_at,
        )
        inputs = LossInputs(
            old_logprobs=logprobs.detach(),
            advantages=torch.stack(advantages),
            clip_scale=torch.ones(8),
            weights=torch.stack(weights),
            turn_ids=torch.arange(8),
            sequence_ids=torch.arange(8) // 2,
            num_turns=8,
            num_sequences=4,
        )
        config = AlgorithmConfig(advantage="grpo", ratio="token", clip_low=0.2, clip_high=0.2, clip_beta=0.0)
        policy_loss(logprobs, inputs, config).loss.backward()
        gradients[trained_at] = -logits.grad
    right = gradients[temperature]
    assert right[0, 1] > 0.1
    assert right[1:].abs().max() < 1e-12
    if temperature != 1.0:
        assert gradients[1.0][1:].abs().max() > 0.01, "log-probs at temperature 1 are biased"
