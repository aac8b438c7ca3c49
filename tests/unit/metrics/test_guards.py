from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2tgpo.config.guard import GuardConfig
from a2tgpo.metrics.guards import Guards

SOUND = {
    "entropy/mean": 1.0,
    "likelihood/correct": -0.5,
    "reward/format_error_rate": 0.1,
    "ratio/noise": 1e-7,
    "gap/train_engine_abs_mean": 0.01,
    "update/skipped": 0.0,
}
# Metric, a value just within the limit that `make` sets, and a value just past it.
MEASURED = {
    "entropy": ("entropy/mean", 0.101, 0.099),
    "likelihood": ("likelihood/correct", -0.99, -1.01),
    "format": ("reward/format_error_rate", 0.29, 0.31),
    "noise_floor": ("ratio/noise", 0.00149, 0.00151),
    "engine_gap": ("gap/train_engine_abs_mean", 0.049, 0.051),
    "failed_calls": ("tools/failed_rate", 0.19, 0.21),
}
SETTING = {
    "entropy": "min_entropy_share",
    "likelihood": "max_likelihood_drop",
    "format": "max_format_error_rise",
    "noise_floor": "max_noise_share",
    "engine_gap": "max_train_engine_gap",
    "failed_calls": "max_failed_calls",
}


def make(**settings) -> Guards:
    return Guards(GuardConfig(**({"baseline_steps": 2} | settings)), clip_low=3e-3, clip_high=4e-3)


def play(guards: Guards, series: list[dict]) -> list[tuple[dict, list[str]]]:
    return [guards.watch(step, metrics) for step, metrics in enumerate(series, start=1)]


def alarms_of(guards: Guards, series: list[dict], name: str) -> list[float]:
    return [alarms[f"alarm/{name}"] for alarms, _ in play(guards, series)]


@pytest.mark.parametrize("name", MEASURED)
def test_an_alarm_starts_and_ends_at_the_second_step_in_a_row(name):
    metric, within, past = MEASURED[name]
    values = [None, None, within, past, within, past, past, within, past, within, within]
    series = [SOUND if value is None else SOUND | {metric: value} for value in values]
    played = play(make(), series)
    assert [alarms[f"alarm/{name}"] for alarms, _ in played] == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0]
    others = {key for alarms, _ in played for key, value in alarms.items() if value} - {f"alarm/{name}"}
    assert not others
    lines = {step: lines for step, (_, lines) in enumerate(played, start=1) if lines}
    assert lines.keys() == {7, 11} and all(len(found) == 1 for found in lines.values())
    start, end = lines[7][0], lines[11][0]
    assert start.startswith(f"step 7: alarm {name}: {metric} is {past:.4g}, limit ")
    assert f"guard.{SETTING[name]}" in start and "; " in start and "\n" not in start
    assert end.startswith(f"step 11: alarm {name} is over: {metric} is {within:.4g}, limit ")


def test_the_limit_of_a_change_is_told_with_its_base_line():
    entropies = [0.8, 1.2, 0.05, 0.05]
    _, lines = play(make(), [SOUND | {"entropy/mean": value} for value in entropies])[-1]
    assert "entropy/mean is 0.05, limit 0.1 (guard.min_entropy_share 0.1, baseline 1)" in lines[0]


def test_the_clipping_range_that_counts_is_the_narrower_one():
    series = [SOUND | {"ratio/noise": 0.0016}] * 2
    narrow_above = Guards(GuardConfig(), clip_low=4e-3, clip_high=3e-3)
    wide = Guards(GuardConfig(), clip_low=4e-3, clip_high=4e-3)
    assert alarms_of(narrow_above, series, "noise_floor") == [0, 1]
    assert alarms_of(wide, series, "noise_floor") == [0, 0]


def test_a_pause_for_a_service_is_an_alarm_of_its_own_at_once_and_for_that_step():
    played = play(make(), [SOUND | {"tools/outage_s": seconds} for seconds in (0.0, 12.0, 0.0)])
    assert [alarms["alarm/outage"] for alarms, _ in played] == [0, 1, 0]
    assert played[1][1][0].startswith("step 2: alarm outage: tools/outage_s is 12, limit 0; a tool's server")


def test_a_single_skipped_update_is_an_alarm_at_once_and_for_that_step():
    skipped = SOUND | {"update/skipped": 1.0}
    played = play(make(), [skipped, SOUND, SOUND])
    assert [alarms["alarm/skipped_updates"] for alarms, _ in played] == [1, 0, 0]
    assert [len(lines) for _, lines in played] == [1, 1, 0]


@pytest.mark.parametrize("metric", SOUND)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_an_alarm_at_once_and_leaves_no_trace(metric, value):
    guards, undisturbed = make(), make()
    alarms, lines = guards.watch(1, SOUND | {metric: value})
    assert [name for name, is_on in alarms.items() if is_on] == ["alarm/non_finite"]
    assert len(lines) == 1 and f"{metric} is {value}" in lines[0]
    alarms, lines = guards.watch(2, SOUND)
    assert not any(alarms.values()) and "alarm non_finite is over" in lines[0]
    undisturbed.watch(1, {name: value for name, value in SOUND.items() if name != metric})
    undisturbed.watch(2, SOUND)
    assert guards.state_dict() == undisturbed.state_dict()


def test_a_value_that_is_not_finite_is_seen_also_where_its_own_alarm_is_turned_off():
    alarms, _ = make(min_entropy_share=0).watch(1, {"entropy/mean": math.nan})
    assert alarms["alarm/non_finite"] == 1 and "alarm/entropy" not in alarms


def test_an_absent_metric_leaves_its_alarm_as_it_is():
    without = {name: value for name, value in SOUND.items() if name != "likelihood/correct"}
    bad = SOUND | {"likelihood/correct": -2.0}
    assert alarms_of(make(), [without] * 6, "likelihood") == [0] * 6
    series = [SOUND, SOUND, bad, without, bad, without, SOUND, without, SOUND]
    assert alarms_of(make(), series, "likelihood") == [0, 0, 0, 0, 1, 1, 1, 1, 0]


def test_the_base_line_is_the_mean_of_the_first_steps_that_have_the_metric():
    without = {name: value for name, value in SOUND.items() if name != "likelihood/correct"}
    taken = [SOUND | {"likelihood/correct": value} for value in (-3.0, -1.0)]
    bad, good = (SOUND | {"likelihood/correct": value} for value in (-2.6, -2.4))
    series = [without, taken[0], without, taken[1], good, good, bad, bad]
    assert alarms_of(make(), series, "likelihood") == [0, 0, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("name", MEASURED)
def test_zero_turns_an_alarm_off(name):
    metric, _, past = MEASURED[name]
    played = play(make(**{SETTING[name]: 0}), [SOUND, SOUND, *[SOUND | {metric: past}] * 3])
    assert all(f"alarm/{name}" not in alarms and not any(alarms.values()) for alarms, _ in played)


def test_format_errors_of_everything_played_count_rather_than_of_the_kept_groups():
    kept, played = "reward/format_error_rate", "sampling/format_error_rate_all"
    rising, falling = ({kept: a, played: b} for a, b in ((0.1, 0.9), (0.9, 0.1)))
    sound = SOUND | {played: 0.1}
    assert alarms_of(make(), [sound, sound, sound | rising, sound | rising], "format") == [0, 0, 0, 1]
    assert alarms_of(make(), [sound, sound, sound | falling, sound | falling], "format") == [0, 0, 0, 0]
    _, lines = play(make(), [sound, sound, sound | rising, sound | rising])[-1]
    assert f"{played} is 0.9, limit 0.3" in lines[0]


def test_an_engine_without_any_finite_log_prob_raises_the_alarm_of_its_gap():
    mean = "gap/train_engine_abs_mean"
    without = {name: value for name, value in SOUND.items() if name != mean}
    broken, mended = without | {"gap/unusable_tokens": 12.0}, SOUND | {"gap/unusable_tokens": 1.0}
    played = play(make(), [broken, broken, mended, mended])
    assert [alarms["alarm/engine_gap"] for alarms, _ in played] == [0, 1, 1, 0]
    assert "gap/unusable_tokens is 12" in played[1][1][0] and f"{mean} is 0.01" in played[3][1][0]
    assert not any(alarms["alarm/non_finite"] for alarms, _ in played)


def test_the_stop_is_due_after_so_many_steps_with_whichever_alarm():
    gap, skipped = SOUND | {"gap/train_engine_abs_mean": 1.0}, SOUND | {"update/skipped": 1.0}
    guards = make(stop_after=3)
    due = []
    for metrics in [skipped, skipped, SOUND, gap, gap, gap | {"update/skipped": 1.0}, gap, SOUND, SOUND]:
        guards.watch(1, metrics)
        due.append(guards.stop_is_due)
    # The gap's alarm lasts from the gap's second step to the step before the alarm ends.
    assert due == [False, False, False, False, False, False, True, True, False]
    assert not guards.active


def test_the_reason_names_every_alarm_and_the_count():
    guards = make(stop_after=2)
    play(guards, [SOUND | {"gap/train_engine_abs_mean": 1.0, "update/skipped": 1.0}] * 2)
    assert (
        guards.stop_is_due and "engine_gap, skipped_updates" in guards.reason and "2 steps" in guards.reason
    )


def test_without_a_stop_rule_no_stop_is_ever_due():
    guards = make(stop_after_skipped=0)
    play(guards, [SOUND | {"update/skipped": 1.0}] * 50)
    assert guards.active and not guards.stop_is_due


def test_updates_skipped_for_too_many_steps_in_a_row_stop_the_run():
    guards = make(stop_after_skipped=3)
    skipped = SOUND | {"update/skipped": 2.0}
    play(guards, [skipped, skipped, SOUND, skipped, skipped])
    assert not guards.stop_is_due
    resumed = make(stop_after_skipped=3)
    resumed.load_state_dict(guards.state_dict())
    for each in (guards, resumed):
        play(each, [skipped])
        assert each.stop_is_due and "3 steps in a row" in each.reason and each.num_skipping == 3


def after(stopped: Guards, *, clip_low: float = 3e-3, **settings) -> Guards:
    """Return guards with these settings that continue from the state of `stopped`."""
    guards = Guards(
        GuardConfig(**({"baseline_steps": 2, "stop_after": 1} | settings)), clip_low=clip_low, clip_high=4e-3
    )
    guards.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    return guards


@pytest.mark.parametrize(
    ("settings", "is_due"),
    [
        ({}, True),
        ({"stop_after": 0}, False),
        ({"max_train_engine_gap": 0}, False),
        ({"max_train_engine_gap": 2}, False),
        ({"max_noise_share": 2}, True),
    ],
    ids=str,
)
def test_a_stopped_run_goes_on_once_its_rule_is_turned_off_or_its_limit_changes(settings, is_due):
    stopped = make(stop_after=1)
    play(stopped, [SOUND | {"gap/train_engine_abs_mean": 1.0}] * 2)
    assert stopped.stop_is_due and after(stopped, **settings).stop_is_due == is_due


def test_an_alarm_with_another_limit_begins_anew_beside_one_that_goes_on():
    stopped = make(stop_after=3)
    past = SOUND | {"gap/train_engine_abs_mean": 1.0, "ratio/noise": 1.0}
    play(stopped, [past] * 5)
    guards = after(stopped, stop_after=3, max_train_engine_gap=0.5)
    assert guards.active == ["noise_floor"]
    due, gap = [], []
    for _ in range(3):
        due.append(guards.stop_is_due)
        gap.append(guards.watch(6, past)[0]["alarm/engine_gap"])
    assert gap == [0, 1, 1] and due == [False] * 3 and guards.stop_is_due


def test_widening_the_clipping_range_is_another_limit_for_the_noise_floor():
    stopped = make(stop_after=1)
    play(stopped, [SOUND | {"ratio/noise": 2e-3}] * 2)
    assert after(stopped).stop_is_due and not after(stopped, clip_low=4e-3).stop_is_due


def test_a_state_without_limits_is_gone_on_with():
    stopped = make(stop_after=1)
    play(stopped, [SOUND | {"gap/train_engine_abs_mean": 1.0}] * 2)
    state = stopped.state_dict()
    del state["limits"]
    guards = make(stop_after=1, max_train_engine_gap=2)
    guards.load_state_dict(state)
    assert guards.stop_is_due and guards.active == ["engine_gap"]


values = st.one_of(st.none(), st.sampled_from([math.nan, 0.0, 1e-3]), st.floats(-3, 3))
series_of_steps = st.lists(st.fixed_dictionaries(dict.fromkeys(SOUND, values)), max_size=14)


@given(series=series_of_steps, baseline_steps=st.integers(1, 4), stop_after=st.integers(0, 3))
def test_a_run_interrupted_at_any_step_decides_as_the_undisturbed_one(series, baseline_steps, stop_after):
    series = [{name: value for name, value in metrics.items() if value is not None} for metrics in series]
    whole = make(baseline_steps=baseline_steps, stop_after=stop_after)
    resumed = make(baseline_steps=baseline_steps, stop_after=stop_after)
    for step, metrics in enumerate(series, start=1):
        saved = json.loads(json.dumps(resumed.state_dict(), allow_nan=False))
        resumed = make(baseline_steps=baseline_steps, stop_after=stop_after)
        resumed.load_state_dict(saved)
        assert resumed.watch(step, metrics) == whole.watch(step, metrics)
        assert resumed.stop_is_due == whole.stop_is_due and resumed.active == whole.active
        assert resumed.state_dict() == whole.state_dict()
