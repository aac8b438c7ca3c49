from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from a2tgpo.config.update import UpdateConfig
from a2tgpo.update.optimizer import LearningRateSchedule


def schedule_of(**options) -> tuple[SimpleNamespace, LearningRateSchedule]:
    """A schedule over a stand-in with two parameter groups, the second without weight decay."""
    groups = [{"wd_mult": 1.0, "max_lr": 7.0, "min_lr": 7.0}, {"wd_mult": 0.0, "max_lr": 7.0, "min_lr": 7.0}]
    optimizer = SimpleNamespace(param_groups=groups)
    config = UpdateConfig(**{"lr": 1.0, "min_lr": 0.1, "weight_decay": 0.5, **options})
    return optimizer, LearningRateSchedule(optimizer, config, total_steps=8)


def rates(optimizer: SimpleNamespace, schedule: LearningRateSchedule, count: int) -> list[float]:
    found = []
    for _ in range(count):
        assert schedule.lr == optimizer.param_groups[0]["lr"] == optimizer.param_groups[1]["lr"]
        found.append(schedule.lr)
        schedule.step()
    return found


def test_a_constant_rate_stays() -> None:
    assert rates(*schedule_of(), 12) == [1.0] * 12


def test_warm_up_reaches_the_peak_without_an_update_at_zero() -> None:
    assert rates(*schedule_of(warmup_steps=4), 6) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_linear_decay_ends_at_the_minimum_and_stays_there() -> None:
    expected = [0.5, 1.0, *(1.0 - 0.9 * k / 6 for k in range(1, 7)), 0.1, 0.1]
    assert rates(*schedule_of(lr_schedule="linear", warmup_steps=2), 10) == pytest.approx(expected)


def test_cosine_decay_is_half_way_at_half_time() -> None:
    found = rates(*schedule_of(lr_schedule="cosine"), 8)
    assert found[3] == pytest.approx(0.55)
    assert found[0] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 8)))
    assert found[7] == pytest.approx(0.1)


def test_weight_decay_spares_the_groups_that_ask_for_none() -> None:
    optimizer, _ = schedule_of()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


def test_a_resumed_schedule_goes_on_with_this_runs_rates() -> None:
    optimizer, saved = schedule_of(lr_schedule="linear")
    expected = rates(optimizer, saved, 3)
    state = saved.state_dict()
    expected = rates(optimizer, saved, 3)
    optimizer, resumed = schedule_of(lr_schedule="linear")
    for group in optimizer.param_groups:
        group["max_lr"] = 99.0  # loading the optimizer's state changes this
    resumed.load_state_dict(state)
    assert rates(optimizer, resumed, 3) == expected
