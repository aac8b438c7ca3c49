"""Measure the time of each stage of a step."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StageTimers:
    """Sums wall time by stage; a stage may repeat, and may contain other stages, whose time it includes.

    Args:
        synchronize: called at both ends of a stage, e.g. torch.cuda.synchronize, so that a stage includes the
            work that it queued; None on CPU.
        enter: called with the name of each outermost stage when it begins, and with "" when it ends.
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
        """Time the body as stage `name`, even if it raises."""
        self._settle()
        if self._enter is not None and not self._open:
            self._enter(name)
        self._open.append(name)
        start = time.perf_counter()
        try:
            yield
            self._settle()
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
            self._open.pop()
            if self._enter is not None and not self._open:
                self._enter("")

    def take(self) -> dict[str, float]:
        """Return the seconds by stage since the last call, as metrics `time/STAGE_s`, and reset them."""
        taken = {f"time/{name}_s": seconds for name, seconds in self._seconds.items()}
        self._seconds = {}
        return taken

    def _settle(self) -> None:
        if self._synchronize is not None:
            self._synchronize()
