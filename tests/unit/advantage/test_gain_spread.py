"""`algorithm.gain_spread_floor`, and the metric for the share of the signal that narrow turn groups have."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_rollouts import MAX_TURNS, NUM_PROMPTS, Row, batches, trajectories_of

from a2tgpo.advantage.estimator import compute_advantages
from a2tgpo.advantage.turn_table import TurnAdvantages, TurnTable, build_turn_table
from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.record.advantage_metrics import add_advantage_metrics

METHODS = ("turn_group", "turn_group_absent")
quick = settings(max_examples=30)
WIDE = [Row(1, (gain,), 0.0) for gain in (0.0, 0.5)]
NARROW = [Row(0, (gain,), 0.0) for gain in (0.1, 0.102)]


def normalized(batch, **fields) -> tuple[TurnTable, TurnAdvantages]:
    table = build_turn_table(trajectories_of(batch), num_prompts=NUM_PROMPTS, max_turns=MAX_TURNS)
    return table, compute_advantages(table, AlgorithmConfig(**fields), dp_group=None)


@pytest.mark.parametrize("name", METHODS)
@quick
@given(batches(), st.sampled_from([0.05, 0.3]))
def test_a_narrow_group_is_divided_by_the_floor_and_a_wide_one_is_not(name, batch, floor):
    _, plain = normalized(batch, advantage=name)
    _, floored = normalized(batch, advantage=name, gain_spread_floor=floor)
    _, centred = normalized(batch, advantage=name, normalize_by_std=False)
    narrow = plain.gain_spread < floor
    assert torch.equal(floored.normalized_gain[~narrow], plain.normalized_gain[~narrow])
    expect = centred.normalized_gain[narrow] / (floor + 1e-6)
    torch.testing.assert_close(floored.normalized_gain[narrow], expect, rtol=0, atol=1e-10)
    assert torch.equal(floored.normalized_outcome, plain.normalized_outcome)
    assert torch.equal(floored.gain_spread, plain.gain_spread)


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_the_share_of_narrow_groups_is_reported_whatever_the_floor(floor):
    metrics = MetricSums()
    # On two ranks, the metric is the share over both ranks together.
    for batch in (WIDE, NARROW):
        table, result = normalized(batch, gain_spread_floor=floor)
        add_advantage_metrics(metrics, table, result, torch.ones(len(batch), MAX_TURNS + 1))
    wide, narrow = 0.25 / (0.25 + 1e-6), 0.001 / (max((1e-6 + 1e-8) ** 0.5, floor) + 1e-6)
    share = metrics.values()["advantage/narrow_signal_share"]
    assert share == pytest.approx(narrow / (narrow + wide), abs=1e-6)


def test_a_method_without_turn_groups_reports_no_share_and_refuses_a_floor():
    metrics = MetricSums()
    table, result = normalized(WIDE, advantage="grpo")
    add_advantage_metrics(metrics, table, result, torch.ones(2, MAX_TURNS + 1))
    assert "advantage/narrow_signal_share" not in metrics.values()
    for fields in ({"advantage": "grpo"}, {"normalize_by_std": False}):
        with pytest.raises(
            ConfigError, match=r"algorithm\.gain_spread_floor is 0\.01; allowed: 0 with"
        ) as caught:
            AlgorithmConfig(gain_spread_floor=0.01, **fields)
        assert "\n" not in str(caught.value)
