"""The output layer runs only for positions whose log-prob is needed. Losses and gradients stay the same."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from a2tgpo.batch.packing import PADDING, Alignment, PackedBatch, empty_batch, pack
from a2tgpo.batch.probes import Probe, ProbedSequence
from a2tgpo.model.build import Policy
from a2tgpo.model.forward import forward_packed
from a2tgpo.model.logprobs import _TokenLogprobs
from a2tgpo.trajectory import Trajectory
from a2tgpo.update.logprobs import compute_logprobs
from a2tgpo.update.probe_logprobs import compute_probe_logprobs
from a2tgpo.update.train_step import LossFunction, compute_gradients
from a2tgpo.warmstart.batches import cross_entropy, token_weights


@contextlib.contextmanager
def counted_rows(policy: Policy) -> Iterator[list[int]]:
    """Record how many rows each call of the output layer computes in this context."""
    rows: list[int] = []
    hook = policy.gpt_models[0].output_layer.register_forward_hook(
        lambda _layer, _inputs, output: rows.append(output[0].size(0))
    )
    yield rows
    hook.remove()


def packed(trajectories: list[Trajectory]) -> list[PackedBatch]:
    return [pack(trajectories, members, align=Alignment(row=8)) for members in (range(4), range(4, 8))]


def wholly(batches: list[PackedBatch]) -> list[PackedBatch]:
    """Return the batches with every position requested."""
    return [dataclasses.replace(batch, loss_mask=torch.ones_like(batch.loss_mask)) for batch in batches]


def weighted(batches: list[PackedBatch]) -> LossFunction:
    """Return a loss with a different weight for each sampled token's log-prob and for the entropy at its position."""

    def loss(number: int, logprobs: torch.Tensor, entropy: torch.Tensor) -> tuple[torch.Tensor, dict]:
        mask = batches[number].loss_mask[0]
        weights = torch.cos(torch.arange(float(mask.sum())))
        return (weights * logprobs[mask] + 0.1 * weights.flip(0) * entropy[mask]).sum(), {}

    return loss


def gradients(policy: Policy, batches: list[PackedBatch], loss: LossFunction) -> dict[str, torch.Tensor]:
    compute_gradients(policy, batches, loss)
    return {name: p.main_grad.clone() for name, p in policy.gpt_models[0].named_parameters()}


def test_as_many_rows_reach_the_output_layer_as_tokens_were_sampled(policy, trajectories) -> None:
    batches = packed(trajectories)
    sampled = [int(batch.loss_mask.sum()) for batch in batches]
    assert sum(sampled) == sum(t.num_sampled_tokens for t in trajectories)
    assert sum(sampled) < sum(batch.num_tokens for batch in batches)
    with counted_rows(policy) as scored:
        compute_logprobs(policy, batches)
    with counted_rows(policy) as trained:
        compute_gradients(policy, batches, weighted(batches))
    assert scored == trained == sampled


def test_branches_run_it_where_an_answer_is_predicted(policy) -> None:
    probes = [Probe(prefix_length=length, scaffold=(3, 4), answer=(5, 6, 7)) for length in (2, 9)]
    with counted_rows(policy) as rows:
        compute_probe_logprobs(
            policy, [ProbedSequence(tokens=list(range(20)), probes=probes)], max_tokens=100
        )
    assert rows == [6]


def test_gradients_are_those_of_the_whole_layer(policy, trajectories) -> None:
    batches = packed(trajectories)
    loss = weighted(batches)
    found, whole = gradients(policy, batches, loss), gradients(policy, wholly(batches), loss)
    for name, gradient in found.items():
        error = (gradient - whole[name]).norm() / whole[name].norm()
        assert whole[name].norm() > 0 and error < 1e-6, (name, error)


def test_entropies_that_no_loss_is_made_of_have_no_backward_pass(policy, trajectories, monkeypatch) -> None:
    batches = packed(trajectories)
    seen: list[tuple[bool, bool]] = []
    backward = _TokenLogprobs.backward

    def watched(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        seen.append(tuple(gradient is not None for gradient in gradients))
        return backward(ctx, *gradients)

    monkeypatch.setattr(_TokenLogprobs, "backward", staticmethod(watched))
    compute_gradients(policy, batches, lambda _number, logprobs, _entropy: (logprobs.sum(), {}))
    compute_gradients(policy, batches, weighted(batches))
    assert seen == [(True, False)] * 2 + [(True, True)] * 2


def test_scores_are_those_of_the_whole_layer_and_zero_elsewhere(policy, trajectories) -> None:
    batches = packed(trajectories)
    for batch, some, whole in zip(
        batches, compute_logprobs(policy, batches), compute_logprobs(policy, wholly(batches)), strict=True
    ):
        mask = batch.loss_mask[0]
        for ours, all_of_them in zip(some, whole, strict=True):
            torch.testing.assert_close(ours[mask], all_of_them[mask], rtol=1e-6, atol=1e-6)
            assert not ours[~mask].any() and all_of_them[~mask].all()


def test_a_micro_batch_without_sampled_tokens_gives_every_parameter_a_zero_gradient(
    policy,
) -> None:
    reached: set[str] = set()
    hooks = [
        p.register_post_accumulate_grad_hook(lambda _, name=name: reached.add(name))
        for name, p in policy.gpt_models[0].named_parameters()
    ]
    nothing = empty_batch(Alignment(row=8))

    def loss(_number: int, logprobs: torch.Tensor, entropy: torch.Tensor) -> Any:
        assert not logprobs.any() and not entropy.any()
        return logprobs.sum(), {}

    with counted_rows(policy) as rows:
        found = gradients(policy, [nothing], loss)
    for hook in hooks:
        hook.remove()
    assert rows == [1] and not any(gradient.any() for gradient in found.values())
    assert reached == set(found)


def test_the_layer_is_left_as_it_was_also_by_a_pass_that_fails(policy) -> None:
    (chunk,), layer = policy.chunks, policy.gpt_models[0].output_layer
    tokens, ends = torch.arange(6)[None], torch.tensor([0, 6])
    with torch.no_grad():
        before = forward_packed(chunk, tokens, tokens, ends)
        with pytest.raises(IndexError):
            forward_packed(chunk, tokens, tokens, ends, output_rows=torch.tensor([6]))
        some = forward_packed(chunk, tokens, tokens, ends, output_rows=torch.tensor([1, 4]))
        assert torch.equal(forward_packed(chunk, tokens, tokens, ends), before)
    torch.testing.assert_close(some, before[[1, 4]], rtol=1e-6, atol=1e-6)
    assert not layer._forward_pre_hooks or policy.trainable


@pytest.mark.parametrize("observation_weight", [0.0, 0.25])
def test_a_warm_start_asks_for_observations_where_they_weigh(
    policy, trajectories, observation_weight
) -> None:
    batches = packed(trajectories)
    weights = token_weights(batches, trajectories, observation_weight=observation_weight)
    assert sum(float(weight.double().sum()) for weight in weights) == pytest.approx(1.0)
    expected = 0.0
    for batch, scored in zip(batches, compute_logprobs(policy, wholly(batches)), strict=True):
        real = batch.sequence_ids[0] != PADDING
        sampled = batch.loss_mask[0]
        observed = real & ~sampled
        expected -= float(
            scored.logprobs[sampled].sum() + observation_weight * scored.logprobs[observed].sum()
        )
    num_sampled = sum(int(batch.loss_mask.sum()) for batch in batches)
    num_real = sum(int((batch.sequence_ids != PADDING).sum()) for batch in batches)
    expected /= num_sampled + observation_weight * (num_real - num_sampled)
    asked = [
        dataclasses.replace(batch, loss_mask=weight[None] > 0)
        for batch, weight in zip(batches, weights, strict=True)
    ]
    with counted_rows(policy) as rows:
        loss = compute_gradients(policy, asked, cross_entropy(weights))["loss over all replicas"]
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert sum(rows) == (num_real if observation_weight else num_sampled)
