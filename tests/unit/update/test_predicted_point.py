"""Predicted points against loops over single weights in float64, and the gate against its definition."""

from __future__ import annotations

import json
import math

import pytest
import torch

from a2tgpo.config.update import ExtrapolationConfig, UpdateConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.update.extrapolation_gate import ExtrapolationGate
from a2tgpo.update.predicted_point import SUMS, predicted_point

LR, DECAY = 1e-2, 0.1


def factor_by_hand(w0: float, w1: float, w2: float, *, lr: float, weight_decay: float, horizon: int) -> float:
    """The factor q of one weight, as its equations read."""
    d0 = ((1 - lr * weight_decay) * w0 - w1) / lr
    d1 = ((1 - lr * weight_decay) * w1 - w2) / lr
    if abs(d0) <= 1e-3:
        return 1.0
    r = min(max(d1 / d0, -2.0), 3.0)
    if abs(1 + r) <= 1e-8:
        return 1.0
    return min(max(sum(r**power for power in range(horizon)) / (1 + r), 1.0), horizon / 2 + 1)


def adam_by_hand(start: list[float], gradients, *, steps: int) -> list[list[float]]:
    """AdamW's weights before and after each of its first `steps` steps, one weight at a time."""
    path, first, second = [list(start)], [0.0] * len(start), [0.0] * len(start)
    for step in range(1, steps + 1):
        weights = list(path[-1])
        for place, gradient in enumerate(gradients(path[-1])):
            first[place] += 0.1 * (gradient - first[place])
            second[place] += 0.001 * (gradient**2 - second[place])
            mean, square = first[place] / (1 - 0.9**step), second[place] / (1 - 0.999**step)
            weights[place] *= 1 - LR * DECAY
            weights[place] -= LR * mean / (math.sqrt(square) + 1e-8)
        path.append(weights)
    return path


@pytest.mark.parametrize("horizon", [2, 3, 5, 10])
def test_points_of_adamw_paths_are_those_of_loops(horizon):
    """Weights that step steadily, ever less, back and forth, or hardly at all."""
    start = torch.linspace(-1, 1, 23, dtype=torch.float64).tolist()
    curvature = [10.0 ** (place % 5 - 2) for place in range(23)]

    def gradients(weights):
        return [
            c * w + 1e-3 * math.sin(place)
            for place, (c, w) in enumerate(zip(curvature, weights, strict=True))
        ]

    path = adam_by_hand(start, gradients, steps=9)
    settings = {"lr": LR, "weight_decay": DECAY, "horizon": horizon}
    for w0, w1, w2 in zip(path, path[1:], path[2:], strict=False):
        factors = [factor_by_hand(*values, **settings) for values in zip(w0, w1, w2, strict=True)]
        expected = [a + 0.5 * q * (c - a) for a, c, q in zip(w0, w2, factors, strict=True)]
        rows = [torch.tensor(values, dtype=torch.float64) for values in (w0, w1, w2)]
        point, sums = predicted_point(*rows, **settings, alpha=0.5)
        torch.testing.assert_close(point, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)
        found = dict(zip(SUMS, sums.tolist(), strict=True))
        assert found["weights"] == 23 and found["factor"] == pytest.approx(sum(factors), abs=1e-9)
        assert found["capped"] == sum(q == horizon / 2 + 1 for q in factors)


def test_special_weights_move_as_the_two_steps_did():
    """Inactive, gone back (r = -1), not finite: q = 1; growing without end: q at its cap."""
    w0 = torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    w1 = torch.tensor([1.0, 0.9, 0.9, 0.9], dtype=torch.float64)
    w2 = torch.tensor([0.5, 1.0, math.inf, 0.1], dtype=torch.float64)
    point, sums = predicted_point(w0, w1, w2, lr=0.1, weight_decay=0.0, horizon=4, alpha=1.0)
    assert point.tolist() == pytest.approx([0.5, 1.0, math.inf, 1 - 3 * 0.9])
    assert dict(zip(SUMS, sums.tolist(), strict=True))["active"] == 3


@pytest.mark.parametrize("horizon", [2, 3, 5, 10])
def test_on_a_diagonal_quadratic_the_point_is_where_that_many_steps_lead(horizon):
    """The steps are those of gradient descent: each is the same factor times the step before."""
    curvature = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    path = [torch.linspace(1, 2, 19, dtype=torch.float64)]
    for _ in range(horizon):
        path.append(path[-1] - curvature * path[-1])
    point, _ = predicted_point(*path[:3], lr=1.0, weight_decay=0.0, horizon=horizon, alpha=1.0)
    torch.testing.assert_close(point, path[horizon], rtol=0, atol=1e-12)
    single = [weights.float() for weights in path[:3]]
    rounded, _ = predicted_point(*single, lr=1.0, weight_decay=0.0, horizon=horizon, alpha=1.0)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.double(), path[horizon], rtol=0, atol=1e-5)


# -- the gate ------------------------------------------------------------------------------------------------

GATE = ExtrapolationConfig(horizon=5, window=4, tau=2.0, patience=2, warmup=3)


def observations(gate: ExtrapolationGate, norms: list[float]) -> list[float | None]:
    return [gate.observe(norm) for norm in norms]


def test_the_gate_gives_no_verdict_before_warmup_and_window_are_over():
    gate = ExtrapolationGate(GATE)
    assert observations(gate, [900.0, 0.0, 900.0, 1.0, 2.0, 3.0, 4.0]) == [None] * 7
    z = gate.observe(5.0)  # of the window 1, 2, 3, 4
    assert z == pytest.approx((5 - 2.5) / math.sqrt(1.25)) and z >= GATE.tau
    assert gate.is_open
    frozen = gate.observe(5.0)
    assert frozen == z, "a step that counts against extrapolation is not in the window"
    assert not gate.is_open


def test_only_consecutive_high_norms_close_the_gate():
    gate = ExtrapolationGate(GATE)
    observations(gate, [0.0] * 3 + [1.0, 2.0, 3.0, 4.0])
    for _ in range(3):
        assert gate.observe(40.0) > GATE.tau
        assert gate.observe(2.5) < GATE.tau
    assert gate.is_open
    assert gate.observe(-40.0) < 0, "small gradients never count"
    assert gate.is_open


def test_a_gate_restored_from_a_checkpoint_decides_to_the_bit_the_same():
    norms = [0.1 * number % 0.7 for number in range(12)] + [9.0, 9.5, 9.9]
    undisturbed = ExtrapolationGate(GATE)
    expected = observations(undisturbed, norms)
    assert not undisturbed.is_open and None not in expected[7:13]
    assert expected[13:] == [None, None], "a closed gate stays closed"
    for stop in range(len(norms)):
        before, after = ExtrapolationGate(GATE), ExtrapolationGate(GATE)
        found = observations(before, norms[:stop])
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        assert found + observations(after, norms[stop:]) == expected
        assert after.is_open == undisturbed.is_open


# -- settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"horizon": 1}, "horizon is 1; allowed: 0, or >= 2"),
        ({"alpha": 0.0}, "alpha is 0.0; allowed: > 0"),
        ({"window": 1}, "window is 1; allowed: >= 2"),
        ({"tau": 0.0}, "tau is 0.0; allowed: > 0"),
        ({"patience": 0}, "patience is 0; allowed: >= 1"),
        ({"warmup": -1}, "warmup is -1; allowed: >= 0"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, says):
    assert not UpdateConfig().extrapolation.is_on
    with pytest.raises(ConfigError, match="update.extrapolation." + says):
        ExtrapolationConfig(**settings)
