"""Extrapolated updates of a real model by Megatron's optimizer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from played_step import minibatches_of
from test_predicted_point import factor_by_hand
from torch import Tensor

from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.update import ExtrapolationConfig, UpdateConfig
from a2tgpo.memory.offload import adam_groups, moment_tensors
from a2tgpo.model.build import build_policy
from a2tgpo.model.logprobs import MODEL_DISTRIBUTION
from a2tgpo.update.extrapolation import Extrapolation
from a2tgpo.update.optimizer import build_optimizer
from a2tgpo.update.policy_update import compute_old_logprobs, update_policy
from a2tgpo.update.train_step import StepResult, compute_gradients, train_step

LR, DECAY = 1e-3, 0.1
NOWHERE = 1e-30
"""An alpha at which every predicted point is the starting point, in float32."""


class Trained:
    """A fresh copy of the fixture's policy with its optimizer, and the batches that it is trained on."""

    def __init__(self, policy, trajectories, *, dtype="float32", distributed=True, clip_grad=1.0, **settings):
        update = UpdateConfig(
            lr=LR, weight_decay=DECAY, distributed_optimizer=distributed, clip_grad=clip_grad
        )
        model = ModelConfig(path=policy.path, dtype=dtype)
        self.policy = build_policy(model, ParallelConfig(), policy.groups, update=update)
        self.optimizer, self.schedule = build_optimizer(self.policy, update, total_steps=9)
        self.extrapolation = Extrapolation(ExtrapolationConfig(**{"horizon": 5, **settings}))
        self.batches = [m.batch for m in minibatches_of(trajectories, policy.groups, num_minibatches=1)[0]]
        self.seen: list[dict[str, Tensor]] = []

    def loss(self, index: int, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """A loss whose gradient changes with the weights. It records the weights at the start of every pass."""
        if index == 0:
            self.seen.append(self.weights())
        signs = torch.cos(torch.arange(logprobs.numel()))
        return (logprobs * signs + 0.01 * logprobs**2).sum() / 50, {}

    def plain(self) -> StepResult:
        return train_step(self.policy, self.optimizer, self.batches, self.loss)

    def extrapolated(self, later: Callable[..., Any] | None = None) -> StepResult:
        losses = (self.loss, later or self.loss)
        return self.extrapolation.step(self.policy, self.optimizer, self.batches, losses)

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.policy.gpt_models[0].named_parameters()}

    def state(self) -> list[Tensor]:
        """Weights, master weights, moments and step counters."""
        groups = adam_groups(self.optimizer)
        tensors = [*self.weights().values(), *(p for group in groups for p in group["params"])]
        counters = [torch.tensor(int(group["step"])) for group in groups]
        return [t.detach().clone() for t in (*tensors, *moment_tensors(self.optimizer), *counters)]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


KINDS = list(itertools.product(("float32", "bfloat16"), (True, False)))


@pytest.mark.parametrize(("dtype", "distributed"), KINDS)
def test_from_the_starting_point_an_update_is_a_plain_one_to_the_bit(
    policy, trajectories, dtype, distributed
):
    """Two probe steps leave nothing behind in master weights, moments and counters."""
    kind = {"dtype": dtype, "distributed": distributed}
    found = Trained(policy, trajectories, **kind, alpha=NOWHERE)
    expected = Trained(policy, trajectories, **kind)
    for _ in range(2):
        found.plain(), expected.plain()
    for _ in range(2):
        result, plain = found.extrapolated(), expected.plain()
        assert result.update_ok and (result.loss, result.grad_norm) == (plain.loss, plain.grad_norm)
        assert equal(found.state(), expected.state())
    assert len(found.seen) == 2 + 2 * 3


@pytest.mark.parametrize(("dtype", "distributed"), KINDS)
def test_over_two_steps_the_point_is_where_they_lead(policy, trajectories, dtype, distributed):
    """Horizon 2, alpha 1: the third pass runs with the weights after two steps; the counter moves by one."""
    kind = {"dtype": dtype, "distributed": distributed}
    found = Trained(policy, trajectories, **kind, horizon=2, alpha=1.0)
    expected = Trained(policy, trajectories, **kind)
    found.plain()
    found.extrapolated()
    for _ in range(3):
        expected.plain()
    expected.seen.append(expected.weights())
    for name, weight in found.seen[3].items():
        torch.testing.assert_close(weight, expected.seen[3][name], rtol=0, atol=1e-8)
    assert {int(group["step"]) for group in adam_groups(found.optimizer)} == {2}


def test_an_update_is_that_of_loops_in_float64(policy, trajectories):
    """AdamW, clipping, the point and the restored state, written again for the model's weights as one vector."""
    found = Trained(policy, trajectories, distributed=False, clip_grad=0.05)
    by_hand = Trained(policy, trajectories, distributed=False)
    names = list(by_hand.weights())
    decays = {
        id(p): group["weight_decay"] for group in adam_groups(by_hand.optimizer) for p in group["params"]
    }
    decay = [decays[id(p)] for p in by_hand.policy.gpt_models[0].parameters()]

    def gradients(weights: list[Tensor]) -> tuple[list[Tensor], float]:
        parameters = list(by_hand.policy.gpt_models[0].parameters())
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.data.copy_(weight)
        compute_gradients(by_hand.policy, by_hand.batches, by_hand.loss)
        raw = [p.main_grad.double().clone() for p in parameters]
        norm = math.sqrt(sum(float(g.square().sum()) for g in raw))
        return [g * min(1.0, 0.05 / (norm + 1e-6)) for g in raw], norm

    def adam(weights, moments, step, grads):
        stepped, after = [], []
        for w, (m, v), g, wd in zip(weights, moments, grads, decay, strict=True):
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            ahead = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            stepped.append(w * (1 - LR * wd) - LR * ahead)
            after.append((m, v))
        return stepped, after

    w0 = [weight.double() for weight in by_hand.weights().values()]
    state = [(torch.zeros_like(w), torch.zeros_like(w)) for w in w0]
    w0, state = adam(w0, state, 1, gradients(w0)[0])
    before = w0
    w1, probe = adam(w0, state, 2, gradients(w0)[0])
    w2, _ = adam(w1, probe, 3, gradients(w1)[0])
    point = []
    for a, b, c, wd in zip(w0, w1, w2, decay, strict=True):
        settings = {"lr": LR, "weight_decay": wd, "horizon": 5}
        rows = zip(a.flatten().tolist(), b.flatten().tolist(), c.flatten().tolist(), strict=True)
        factors = torch.tensor([factor_by_hand(*row, **settings) for row in rows], dtype=torch.float64)
        point.append(a + 0.5 * factors.view_as(a) * (c - a))
    grads, norm = gradients(point)
    expected, _ = adam(point, state, 2, grads)

    found.plain()
    result = found.extrapolated()
    assert norm > 0.05, "gradients are not clipped: the test is blind to it"
    assert result.grad_norm == pytest.approx(norm, rel=1e-4)
    for name, weight, now, then in zip(names, found.weights().values(), expected, before, strict=True):
        error = float((weight.double() - now).norm() / (now - then).norm())
        assert error < 2e-2, f"{name}: {error:.1e} of the update"
    whole = [
        torch.cat([t.flatten().double() for t in tensors])
        for tensors in (found.weights().values(), expected, before)
    ]
    assert float((whole[0] - whole[1]).norm() / (whole[1] - whole[2]).norm()) < 5e-3


# -- what is not finite --------------------------------------------------------------------------------------


def failing(trained: Trained, in_pass: int) -> Callable[..., Any]:
    """The loss, with NaN gradients in the given later pass (2 or 3)."""
    first = len(trained.seen)

    def loss(index, logprobs, entropy):
        value, metrics = trained.loss(index, logprobs, entropy)
        return (value * math.nan if len(trained.seen) - first == in_pass else value), metrics

    return loss


def test_a_second_pass_that_is_not_finite_leaves_a_plain_update(policy, trajectories):
    found, expected = Trained(policy, trajectories), Trained(policy, trajectories)
    for trained in (found, expected):
        trained.plain()
    result, plain = found.extrapolated(failing(found, 2)), expected.plain()
    assert result == plain and result.update_ok
    assert equal(found.state(), expected.state())
    metrics = found.extrapolation.take_metrics(num_updates=1).values()
    assert metrics == {
        "extrapolation/fallbacks": 1.0,
        "extrapolation/active": 0.0,
        "extrapolation/passes": 2.0,
    }


@pytest.mark.parametrize("in_pass", [1, 3])
def test_a_first_or_third_pass_that_is_not_finite_skips_the_update(policy, trajectories, in_pass):
    trained = Trained(policy, trajectories)
    trained.plain()
    before = trained.state()
    if in_pass == 1:
        losses = (failing(trained, 1), trained.loss)
        result = trained.extrapolation.step(trained.policy, trained.optimizer, trained.batches, losses)
    else:
        result = trained.extrapolated(failing(trained, 3))
    assert not result.update_ok
    assert equal(trained.state(), before)
    assert trained.extrapolation.take_metrics(num_updates=1).values()["extrapolation/active"] == 0


# -- a step of mini-batches ----------------------------------------------------------------------------------


def train(trained: Trained, trajectories, *, steps: int, **algorithm) -> list[dict[str, float]]:
    """Return the metrics of each step. A step has two mini-batches that were scored before."""
    found = []
    for _ in range(steps):
        minibatches = minibatches_of(trajectories, trained.policy.groups, **algorithm)
        minibatches, _ = compute_old_logprobs(trained.policy, minibatches, distribution=MODEL_DISTRIBUTION)
        metrics, _ = update_policy(
            trained.policy,
            trained.optimizer,
            trained.schedule,
            minibatches,
            AlgorithmConfig(**algorithm),
            distribution=MODEL_DISTRIBUTION,
            extrapolation=trained.extrapolation,
        )
        found.append(metrics.values())
    return found


def test_a_run_extrapolates_from_its_second_update_until_the_gate_closes(policy, trajectories):
    settings = {"window": 2, "warmup": 0, "patience": 1, "tau": 1e-6}
    trained = Trained(policy, trajectories, **settings)
    steps = train(trained, trajectories, steps=2, ratio="token")
    assert [step["extrapolation/active"] for step in steps] == [0.5, 1.0]
    assert [step["extrapolation/passes"] for step in steps] == [2.0, 3.0]
    assert trained.schedule.steps_done == 4
    assert steps[1]["extrapolation/multiplier"] == pytest.approx(0.5 * steps[1]["extrapolation/factor_mean"])
    assert 1 <= steps[1]["extrapolation/factor_mean"] <= 3.5
    assert 0 <= steps[1]["extrapolation/inactive_share"] < 1
    trained.extrapolation.gate.observe(1e9)
    assert not trained.extrapolation.gate.is_open
    (after,) = train(trained, trajectories, steps=1, ratio="token")
    assert after["extrapolation/active"] == 0 and after["extrapolation/passes"] == 1


def test_ratios_of_later_passes_are_measured_from_where_they_run_or_from_the_step(policy, trajectories):
    """After large steps, nearly every ratio to the policy that played is clipped, but no ratio to the pass's own
    policy."""
    shares = {}
    for old in ("probe", "step"):
        trained = Trained(policy, trajectories, old_logprobs=old)
        _, last = train(trained, trajectories, steps=2, ratio="token", clip_low=1e-6, clip_high=1e-6)
        shares[old] = last["extrapolation/clip_fraction"]
    assert shares["probe"] == 0 and 0.1 < shares["step"] <= 1


def test_without_extrapolation_a_step_has_no_metrics_of_it(policy, trajectories):
    trained = Trained(policy, trajectories, horizon=0)
    (metrics,) = train(trained, trajectories, steps=1)
    assert not [name for name in metrics if name.startswith("extrapolation/")]
