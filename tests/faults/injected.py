"""launch/train.py with injected faults. tests/faults/ starts this program on every rank.

The environment variable FAULTS contains a JSON list of {"point", "action", "step", "rank", "call"}. When the rank
passes `point` for the `call`-th time (default 1) in step `step`, it does `action`. Steps are counted from 1, and 0
means before the first step. The program itself knows nothing of the faults: functions of its stages are replaced
before it starts.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

RANK = int(os.environ.get("RANK", "0"))


class Faults:
    """The faults of this rank, and how often it has passed their points."""

    def __init__(self) -> None:
        self.pending = [f for f in json.loads(os.environ.get("FAULTS", "[]")) if f.get("rank", RANK) == RANK]
        self.step = 0
        self.passed: dict[tuple[str, int], int] = {}

    def at(self, point: str) -> None:
        """Record that the rank passes `point`, and run the fault that is due, if any."""
        key = (point, self.step)
        self.passed[key] = self.passed.get(key, 0) + 1
        for fault in self.pending:
            # Training continues while a thread saves, perhaps into the next step.
            late = 1 if point.startswith("save") else 0
            is_here = (
                fault["point"] == point and self.step - late <= fault.get("step", self.step) <= self.step
            )
            if is_here and self.passed[key] == fault.get("call", 1) and not fault.setdefault("done", False):
                fault["done"] = True
                # The harness compares this time with its own. Both are from the system's monotonic clock.
                with open(os.environ["FAULT_FILE"], "a") as stream:
                    stream.write(f"{time.monotonic()}\n")
                ACTIONS[fault["action"]](fault)


FAULTS = Faults()


def fill_disk(fault: dict) -> None:
    """Fill the disk of `path` until only `free` bytes are left."""
    path = Path(fault["path"])
    status = os.statvfs(path)
    free = status.f_bavail * status.f_frsize
    with open(path / "filling", "ab") as stream:
        stream.write(bytes(max(0, free - fault["free"])))


def jump_clock(fault: dict) -> None:
    real = time.time
    time.time = lambda: real() + fault["seconds"]


def shrink_files(fault: dict) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], resource.RLIM_INFINITY))


def fail(fault: dict) -> None:
    raise RuntimeError("an injected failure")


def poison(fault: dict) -> None:
    """Make the next loss on this rank NaN."""
    FAULTS.passed[("poisoned", 0)] = 1


def forget_searches(fault: dict) -> None:
    """Empty the caches, so that every search of this step is sent to the server."""
    for cache in FORGETTABLE:
        cache.clear()


FORGETTABLE: list[Any] = []

ACTIONS: dict[str, Callable[[dict], Any]] = {
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    "term": lambda _: os.kill(os.getpid(), signal.SIGTERM),
    "usr1": lambda _: os.kill(os.getpid(), signal.SIGUSR1),
    "sleep": lambda fault: time.sleep(fault["seconds"]),
    "hang": lambda _: time.sleep(100_000),
    "hold": lambda _: ctypes.PyDLL(None).sleep(
        100_000
    ),  # like compiled code that never releases the interpreter
    "fail": fail,
    "nan": poison,
    "fill disk": fill_disk,
    "empty disk": lambda fault: (Path(fault["path"]) / "filling").unlink(missing_ok=True),
    "jump clock": jump_clock,
    "forget searches": forget_searches,
    "limit file size": shrink_files,
}


def passing(owner: Any, name: str, point: str, *, after: bool = False) -> None:
    """Make each call of `owner.name` pass `point` before its work, or after its work if `after`."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not after:
            FAULTS.at(point)
        result = function(*args, **kwargs)
        if after:
            FAULTS.at(point)
        return result

    setattr(owner, name, wrapped)


def passing_while(owner: Any, name: str, condition: Callable[[Any], Any], point: str) -> None:
    """Make calls of the method `owner.name` pass `point` before their work, if `condition` is true for the object."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if condition(self):
            FAULTS.at(point)
        return function(self, *args, **kwargs)

    setattr(owner, name, wrapped)


def install() -> None:
    """Put the points into the stages of a step."""
    import torch
    from vllm.v1.engine.llm_engine import LLMEngine

    from a2tgpo import trainer
    from a2tgpo.checkpoint import folder as checkpoint
    from a2tgpo.checkpoint import retention
    from a2tgpo.checkpoint import writer as checkpoint_writer
    from a2tgpo.collect import bank as rollout_bank
    from a2tgpo.metrics.guards import Guards
    from a2tgpo.record import recorder
    from a2tgpo.rollout.answer_scorer import AnswerScorer
    from a2tgpo.rollout.held_calls import HeldCalls
    from a2tgpo.rollout.tool_pool import ToolPool
    from a2tgpo.run import checkpoints as run_checkpoints
    from a2tgpo.search.tool import CachedSearch
    from a2tgpo.update import policy_update

    step = trainer.Trainer.train_step

    def counted(self: Any) -> Any:
        FAULTS.step = self.step + 1
        tell_step(FAULTS.step)
        FAULTS.at("step begins")
        return step(self)

    trainer.Trainer.train_step = counted
    passing(trainer, "start_rollout" if hasattr(trainer, "start_rollout") else "sync_engine", "refit")
    passing(LLMEngine, "step", "rollout")
    passing(ToolPool, "submit", "search")
    passing(AnswerScorer, "submit", "gain")
    passing_while(HeldCalls, "take_due", len, "outage")
    passing(rollout_bank.RolloutBank, "put", "before the bank")
    passing(rollout_bank.RolloutBank, "put", "after the bank", after=True)
    passing(trainer, "exchange", "exchange")
    passing(trainer, "step_advantages", "advantage")
    passing(trainer, "compute_old_logprobs", "score")
    passing(policy_update, "train_step", "update")
    passing(trainer, "update_policy", "after the update", after=True)
    passing(recorder.Recorder, "record_step", "record")
    passing(recorder.Recorder, "_record_rollouts", "after the record", after=True)
    passing(Guards, "watch", "between steps")
    passing(trainer, "evaluate", "evaluation")
    passing(checkpoint_writer, "copy_sharded", "save: copy")
    passing(checkpoint_writer, "write_sharded", "save: write")
    passing(torch.distributed.checkpoint.FileSystemWriter, "write_data", "save: written", after=True)
    passing(checkpoint, "put_in_place", "save: before the rename")
    passing(run_checkpoints.RunCheckpoints, "_tidy", "save: after the rename")
    passing(retention, "drop_old", "save: before old ones go")
    build = CachedSearch.__init__

    def remembered(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        FORGETTABLE.append(self._cache)

    CachedSearch.__init__ = remembered
    policy_loss = policy_update.policy_loss

    def poisonable(*args: Any, **kwargs: Any) -> Any:
        result = policy_loss(*args, **kwargs)
        is_poisoned = FAULTS.passed.pop(("poisoned", 0), 0)
        return dataclasses.replace(result, loss=result.loss * math.nan) if is_poisoned else result

    policy_update.policy_loss = poisonable


def tell_step(step: int) -> None:
    """Write the step to the file that a scripted search server reads."""
    if RANK == 0 and "STEP_FILE" in os.environ:
        path = Path(os.environ["STEP_FILE"])
        path.with_suffix(".new").write_text(str(step))
        path.with_suffix(".new").replace(path)


if __name__ == "__main__":
    import launch.train

    install()
    try:
        sys.exit(launch.train.main())
    except Exception:
        traceback.print_exc()
        sys.exit(1)
