"""Which steps are profiled."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest
import torch

from a2tgpo.config.profile import ProfileConfig
from a2tgpo.metrics.timers import StageTimers
from a2tgpo.record.profiler import StepProfiler

NO_PHASES: Any = None
"""No snapshots are written, so no phase is observed."""


def test_only_chosen_steps_leave_a_trace_and_a_step_that_raises_leaves_none(tmp_path) -> None:
    profiler = StepProfiler(ProfileConfig(steps=(2, 3)), tmp_path / "profile", NO_PHASES, rank=5)
    timers = StageTimers()

    def step(number: int, *, fails: bool = False) -> None:
        with profiler.step(number), timers.stage("update"):
            torch.ones(3).cumsum(0)
            if fails:
                raise KeyError(number)

    step(1)
    assert not (tmp_path / "profile").exists()
    with pytest.raises(KeyError):
        step(2, fails=True)
    step(3)
    (trace,) = tmp_path.rglob("*.gz")
    assert trace == tmp_path / "profile" / "step_3" / "trace.rank_5.json.gz"
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert {"stage: update", "aten::cumsum"} <= names
