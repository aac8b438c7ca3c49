"""The loop of a warm start, with steps and evaluations that only take time."""

from types import SimpleNamespace

import pytest

from a2tgpo.config.warmstart import WarmstartConfig
from a2tgpo.metrics.timers import StageTimers
from a2tgpo.warmstart import loop

STEP_S, EVALUATION_S, SAVE_S = 10.0, 300.0, 50.0


class TimedWarmStart(loop.WarmStart):
    def __init__(self):
        self.settings = WarmstartConfig(steps=5, evaluate_every=2)
        self.examples, self.timers = SimpleNamespace(held_out=["one"]), StageTimers()
        self.report = SimpleNamespace(add_held_out=lambda *_: None, say_done=lambda: None)
        self.folder = SimpleNamespace(longest_save_s=SAVE_S, finish_saving=lambda: None)
        self.stop = SimpleNamespace(should_stop=self.ask, agree=lambda _: None)
        self.step, self.now, self.asked = 0, 0.0, []
        self._longest_step_s = self._longest_evaluation_s = 0.0

    def ask(self, *, needed_s):
        self.asked.append(needed_s)

    def _train_step(self):
        self.step += 1
        self._longest_step_s = STEP_S

    def _held_out_loss(self):
        self.now += EVALUATION_S
        return 0.0

    def _save(self):
        pass

    def _export(self):
        pass


def test_a_step_begins_only_if_the_evaluation_after_it_and_a_save_end_in_time(
    monkeypatch: pytest.MonkeyPatch,
):
    warm_start = TimedWarmStart()
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: warm_start.now))
    assert warm_start.train()
    with_evaluation = STEP_S + EVALUATION_S + SAVE_S
    first, *others = warm_start.asked
    assert first == SAVE_S, "no step has been measured yet"
    assert others == [with_evaluation, STEP_S + SAVE_S, with_evaluation, with_evaluation]
