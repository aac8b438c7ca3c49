import time

import pytest

from a2tgpo.metrics.timers import StageTimers


def test_repeated_and_nested_stages_add_up():
    timers = StageTimers()
    for _ in range(2):
        with timers.stage("rollout"):
            with timers.stage("gain"):
                time.sleep(0.02)
            time.sleep(0.01)
    taken = timers.take()
    assert taken.keys() == {"time/rollout_s", "time/gain_s"}
    assert taken["time/rollout_s"] - 0.02 > taken["time/gain_s"] - 0.001 > 0.038
    assert timers.take() == {}


def test_stage_that_raises_is_timed_and_closed():
    entered: list[str] = []
    timers = StageTimers(enter=entered.append)
    with pytest.raises(KeyError), timers.stage("update"):
        raise KeyError
    assert "time/update_s" in timers.take()
    assert entered == ["update", ""]


def test_device_is_awaited_at_both_ends():
    calls = []
    timers = StageTimers(synchronize=lambda: calls.append("synchronize"))
    with timers.stage("score"):
        calls.append("body")
    assert calls == ["synchronize", "body", "synchronize"]
