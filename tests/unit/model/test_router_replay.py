"""Router replay in one process, with and without recomputed layers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from random_trajectories import random_trajectories

from a2tgpo.batch.packing import Alignment, PackedBatch, pack
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.update import UpdateConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.model.build import Policy, build_policy
from a2tgpo.update.logprobs import compute_logprobs
from a2tgpo.update.train_step import compute_gradients

MODES = ("none", "full")


@pytest.fixture
def policies(checkpoint, groups) -> dict[str, Policy]:
    """Return the same mixture of experts without and with recomputation."""
    path = str(checkpoint("qwen3_moe"))
    update = UpdateConfig(distributed_optimizer=False)
    return {
        mode: build_policy(
            ModelConfig(path=path, dtype="float32", recompute=mode),
            ParallelConfig(),
            groups,
            update=update,
            router_replay=True,
        )
        for mode in MODES
    }


def batches_of(policy: Policy, *, missing: int | None = None) -> list[PackedBatch]:
    """Return two micro-batches of two trajectories with random experts. Trajectory `missing` has no experts."""
    shape = policy.expert_shape
    assert shape is not None

    def experts_of(number: int, rng: np.random.Generator, length: int) -> bytes:
        scores = rng.random((length, shape.layers, shape.experts))
        return b"" if number == missing else shape.encode(scores.argsort(-1)[..., : shape.chosen])

    made = random_trajectories(experts_of)
    return [pack(made, rows, align=Alignment(), expert_shape=shape) for rows in ((0, 1), (2, 3))]


def trained(policy: Policy, batches: list[PackedBatch]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return the log-probs of a training pass, and the gradients of their sum."""
    found = []

    def loss(_, logprobs, entropy):
        found.append(logprobs.detach().clone())
        return logprobs.sum(), {}

    compute_gradients(policy, batches, loss)
    return found, torch.cat([p.main_grad.flatten() for chunk in policy.chunks for p in chunk.parameters()])


def own_experts(policy: Policy, batches: list[PackedBatch]) -> list[PackedBatch]:
    """Return the batches with the experts that the routers choose on their own."""
    layers, maps = policy.gpt_models[0].decoder.layers, []
    hooks = [layer.mlp.router.register_forward_hook(lambda *a: maps.append(a[2][1])) for layer in layers]
    compute_logprobs(policy, [dataclasses.replace(batch, experts=None) for batch in batches])
    for hook in hooks:
        hook.remove()
    found = []
    for number, batch in enumerate(batches):
        own = maps[number * len(layers) : (number + 1) * len(layers)]
        ids = torch.stack([chosen.nonzero()[:, 1].view(-1, 2) for chosen in own], 1)
        found.append(dataclasses.replace(batch, experts=ids.to(torch.uint8)))
    return found


def test_experts_are_replayed_to_the_bit_where_layers_are_computed_again(policies):
    batches = batches_of(policies["none"], missing=1)
    logprobs, gradients = trained(policies["none"], batches)
    again, same = trained(policies["full"], batches)
    assert all(map(torch.equal, logprobs, again)) and torch.equal(gradients, same)
    own, other = trained(policies["none"], [dataclasses.replace(batch, experts=None) for batch in batches])
    first = batches[0].sequence_ids[0] == 1
    assert (own[0] - logprobs[0])[~first].abs().max() > 0.1 and not torch.equal(gradients, other)
    # The trajectory without rows has the routers' own experts.
    torch.testing.assert_close(own[0][first], logprobs[0][first], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_replaying_the_routers_own_experts_changes_no_bit(policies, mode):
    policy = policies[mode]
    plain = [dataclasses.replace(batch, experts=None) for batch in batches_of(policy)]
    logprobs, gradients = trained(policy, plain)
    again, same = trained(policy, own_experts(policy, plain))
    assert all(map(torch.equal, logprobs, again)) and torch.equal(gradients, same)


def test_a_comparison_finds_the_changed_rows_and_replays_nothing(policies):
    policy = policies["full"]
    assert policy.router_replay is not None
    batch, _ = own_experts(policy, batches_of(policy))
    (plain,) = compute_logprobs(policy, [dataclasses.replace(batch, experts=None)])
    experts = batch.experts.clone()
    experts[3, 1] = torch.tensor([7, 0]) if set(experts[3, 1].tolist()) != {0, 7} else torch.tensor([1, 2])
    experts[4] = experts[4].flip(-1)  # the same experts in another order
    experts[5] = policy.expert_shape.no_expert
    with policy.router_replay.comparing(batch.num_tokens) as differs:
        (scored,) = compute_logprobs(policy, [dataclasses.replace(batch, experts=experts)])
    assert differs.nonzero().tolist() == [[1, 3]] and torch.equal(scored.logprobs, plain.logprobs)


def test_layers_that_the_backward_pass_leaves_out_are_an_error(policies):
    policy = policies["full"]
    batch, _ = batches_of(policy)
    with policy.router_replay.replaying(policy.gpt_models[0], batch):
        pass
    with pytest.raises(RuntimeError, match=r"did not reach layers \[0, 1\]"):
        policy.router_replay.check_spent()


def test_a_dense_model_cannot_replay(checkpoint, groups):
    model = ModelConfig(path=str(checkpoint("qwen3")), dtype="float32")
    with pytest.raises(
        ConfigError, match=r"router_replay is true; allowed: false, since a qwen3 model has no exp"
    ):
        build_policy(model, ParallelConfig(), groups, update=UpdateConfig(), router_replay=True)
