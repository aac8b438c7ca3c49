"""Measure the time of each stage of a step."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.profiler import record_function


class StageTimers:
    """Measure the wall time of each stage.

    If a stage runs several times, its times are added. The time of a stage includes the time of stages inside it. In
    a profile, each stage is a range with the name `stage: NAME`. On a GPU it is also an NVTX range.

    Args:
        synchronize: function that waits for the device, such as torch.cuda.synchronize. It runs at the beginning and
            the end of a stage, so that the stage's time includes queued work. None on CPUs.
        enter: function that is called with the stage's name when an outermost stage begins, and with "" when that
            stage ends.
    """

    def __init__(
        self, synchronize: Callable[[], None] | None = None, *, enter: Callable[[str], None] | None = None
    ):
        self._synchronize = synchronize
        self._enter = enter
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the `with` block to stage `name`, even if the block raises."""
        self._settle()
        if self._enter is not None and not self._open:
            self._enter(name)
        self._open.append(name)
        start = time.perf_counter()
        try:
            with record_function(f"stage: {name}"), _nvtx_range(f"stage: {name}"):
                yield
                self._settle()
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
            self._open.pop()
            if self._enter is not None and not self._open:
                self._enter("")

    def take(self) -> dict[str, float]:
        """Return the metrics `time/STAGE_s`, the seconds spent in each stage since the last call."""
        taken = {f"time/{name}_s": seconds for name, seconds in self._seconds.items()}
        self._seconds = {}
        return taken

    def _settle(self) -> None:
        if self._synchronize is not None:
            self._synchronize()


def _nvtx_range(name: str) -> AbstractContextManager[None]:
    return torch.cuda.nvtx.range(name) if torch.cuda.is_available() else nullcontext()
