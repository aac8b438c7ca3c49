"""The balancing loss of routers in one process, against loops in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_trajectories import random_trajectories
from torch import Tensor

from a2tgpo.batch.expert_rows import ExpertShape
from a2tgpo.batch.packing import Alignment, PackedBatch, pack
from a2tgpo.config.load import load_config
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.update import UpdateConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.model.build import Policy, build_policy
from a2tgpo.trajectory import Trajectory
from a2tgpo.update.expert_balance import balance_metrics
from a2tgpo.update.logprobs import compute_logprobs
from a2tgpo.update.train_step import compute_gradients

COEF, EXPERTS, CHOSEN = 0.25, 8, 2
PADDED = Alignment(row=16, segment=4)
QUICKSTART = Path(__file__).parents[3] / "configs/quickstart.yaml"


@pytest.fixture
def build(checkpoint, groups) -> Any:
    """Return a function that builds a model with a balancing loss."""

    def of(recompute: str, architecture: str = "qwen3_moe") -> Policy:
        return build_policy(
            ModelConfig(path=str(checkpoint(architecture)), dtype="float32", recompute=recompute),
            ParallelConfig(),
            groups,
            update=UpdateConfig(distributed_optimizer=False, router_balance_coef=COEF),
            router_replay=architecture == "qwen3_moe",
        )

    return of


def trajectories_of(shape: ExpertShape, *, with_experts: bool) -> list[Trajectory]:
    def experts_of(_: int, rng: np.random.Generator, length: int) -> bytes:
        if not with_experts:
            return b""
        scores = rng.random((length, shape.layers, shape.experts)) ** 4
        scores[..., 0] += 0.5
        return shape.encode(scores.argsort(-1)[..., ::-1][..., : shape.chosen])

    return random_trajectories(experts_of)


def balanced(policy: Policy, batches: list[PackedBatch]) -> tuple[float, list[Tensor]]:
    """Return the balancing loss of a training pass without another loss, and the gradients of the routers."""
    compute_gradients(policy, batches, lambda _, logprobs, entropy: (0.0 * logprobs.sum(), {}))
    loss = balance_metrics(policy).values()["experts/balance_loss"]
    (model,) = policy.gpt_models
    return loss, [layer.mlp.router.weight.main_grad.clone() for layer in model.decoder.layers]


def by_loops(policy: Policy, batches: list[PackedBatch]) -> tuple[float, Tensor]:
    """Return the mean of the layers' losses, and the gradient of the last router, from what the routers see."""
    (model,) = policy.gpt_models
    routers = [layer.mlp.router for layer in model.decoder.layers]
    seen: list[tuple[Any, Tensor, Tensor]] = []
    hooks = [r.register_forward_hook(lambda r, x, y: seen.append((r, x[0][:, 0], y[1]))) for r in routers]
    compute_logprobs(policy, batches)
    for hook in hooks:
        hook.remove()
    of_batch = [batch for batch in batches for _ in routers]
    total, gradient = 0.0, torch.zeros(EXPERTS, routers[-1].weight.size(1), dtype=torch.float64)
    num_trajectories = sum(batch.num_sequences for batch in batches)
    for batch, (router, hidden, chosen) in zip(of_batch, seen, strict=True):
        for number in range(batch.num_sequences):
            places = (batch.sequence_ids[0] == number).nonzero()[:, 0].tolist()
            inputs = hidden[places].double()
            probs = (inputs @ router.weight.detach().double().T).softmax(-1)
            share = [sum(int(chosen[t, e]) for t in places) / (len(places) * CHOSEN) for e in range(EXPERTS)]
            for x, p in zip(inputs, probs, strict=True):
                of_token = sum(share[e] * float(p[e]) for e in range(EXPERTS))
                total += EXPERTS * of_token / len(places) / num_trajectories
                if router is routers[-1]:
                    slopes = torch.tensor([float(p[e]) * (share[e] - of_token) for e in range(EXPERTS)])
                    gradient += COEF * EXPERTS / len(places) / num_trajectories * slopes[:, None] * x
    return total / len(routers), gradient


@pytest.mark.parametrize("with_experts", [False, True], ids=["own experts", "replayed experts"])
def test_the_balancing_loss_is_that_of_loops_over_trajectories(build, with_experts):
    policies = {recompute: build(recompute) for recompute in ("none", "full")}
    shape = policies["none"].expert_shape
    made = trajectories_of(shape, with_experts=with_experts)
    ways = [[(0, 1), (2, 3)], [(3, 0, 2, 1)], [(0,), (1,), (2,), (3,)]]
    packings = [[pack(made, rows, align=PADDED, expert_shape=shape) for rows in way] for way in ways]
    expected, slope = by_loops(policies["none"], packings[0])
    found = [balanced(policies["none"], batches) for batches in packings]
    # A router gives higher probabilities to the experts that it chooses on its own.
    assert slope.norm() > 1e-2 and (expected > 1) == (not with_experts), expected
    for loss, gradients in found:
        assert loss == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(gradients[-1].double(), slope, rtol=1e-4, atol=1e-7)
        for gradient, first in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(gradient, first, rtol=1e-3, atol=1e-6)
    again, same = balanced(policies["full"], packings[0])
    assert again == found[0][0] and all(map(torch.equal, same, found[0][1]))


def test_scoring_adds_no_balancing_loss(build):
    policy = build("full")
    batches = [pack(trajectories_of(policy.expert_shape, with_experts=False), range(4), align=PADDED)]
    loss, _ = balanced(policy, batches)
    compute_logprobs(policy, batches)
    compute_logprobs(policy, batches)
    assert balanced(policy, batches)[0] == loss and not balance_metrics(policy).values()


def test_a_dense_model_has_no_routers_to_balance(build):
    with pytest.raises(
        ConfigError, match=r"router_balance_coef is 0.25; allowed: 0, since a qwen3 model has"
    ):
        build("none", "qwen3")


@pytest.mark.parametrize(
    ("others", "says"),
    [
        (["update.freeze_router=true"], "allowed: 0 with update.freeze_router=true, since"),
        (["model.lora.rank=4"], "allowed: 0 with model.lora.rank=4, because"),
    ],
)
def test_a_balancing_loss_is_refused_where_the_routers_do_not_learn(others, says):
    load_config(QUICKSTART, ["update.router_balance_coef=0.1"]).check_training()
    with pytest.raises(ConfigError) as error:
        load_config(QUICKSTART, ["update.router_balance_coef=0.1", *others]).check_training()
    assert f"update.router_balance_coef is 0.1; {says}" in str(error.value)
