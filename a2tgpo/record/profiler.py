"""Profile chosen steps of a run: traces of torch's profiler, ranges for Nsight Systems, and memory snapshots."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from a2tgpo.config.profile import ProfileConfig
from a2tgpo.memory.phases import MemoryPhases
from a2tgpo.memory.snapshots import MemorySnapshots
from a2tgpo.parallel.ranges import megatron_ranges


class StepProfiler:
    """Profiles the steps of `profile.steps`. Every rank has one profiler and writes its own files.

    Args:
        folder: the folder of the run's profiles. Those of step N are in `step_N/`.
        phases: reports when a memory phase ends.
    """

    def __init__(self, config: ProfileConfig, folder: Path, phases: MemoryPhases, *, rank: int):
        self._config, self._folder, self._phases, self._rank = config, folder, phases, rank
        on_gpu = torch.cuda.is_available()
        self._activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Profile the `with` block if `number` is a chosen step. If the block raises, no trace is written."""
        if number not in self._config.steps:
            yield
            return
        folder = self._folder / f"step_{number}"
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            if self._config.memory:
                snapshots = MemorySnapshots(folder, self._config.memory, rank=self._rank)
                stack.enter_context(self._phases.observed_by(stack.enter_context(snapshots)))
            recording = _for_nsys() if self._config.tool == "nsys" else self._trace(folder)
            stack.enter_context(recording)
            yield

    @contextmanager
    def _trace(self, folder: Path) -> Iterator[None]:
        with profile(activities=self._activities) as recorded:
            yield
        recorded.export_chrome_trace(str(folder / f"trace.rank_{self._rank}.json.gz"))


@contextmanager
def _for_nsys() -> Iterator[None]:
    """Mark the block as the range that `nsys profile --capture-range=cudaProfilerApi` captures."""
    torch.cuda.cudart().cudaProfilerStart()
    try:
        with megatron_ranges():
            yield
    finally:
        torch.cuda.cudart().cudaProfilerStop()
