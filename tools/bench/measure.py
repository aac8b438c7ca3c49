"""Shared by all benches: rounds of two variants side by side, and the row that a comparison gives.

A bench is a module here with `rows() -> list[Row]`, named in run.py.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Variant = Callable[[], object]
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: ours against a baseline, measured in one run."""

    name: str
    """The quantity and its size."""
    ours: float
    baseline: float
    baseline_is: str
    unit: str
    """Unit of `ours` and `baseline`: "CPU s" (user and system time of the process), "s" (wall), "MB", "tokens/s",
    "bytes", ...
    """
    ratio: float
    """Median of the rounds' ratios, each defined by `ratio_is`."""
    ratio_is: str
    """baseline / ours | ours / baseline"""
    noise: float
    """Half the range of the rounds' ratios over their median; 0 if the values are counted, not measured."""
    target: str = ""
    """">= 200", "<= 0.03"; empty: no target."""
    note: str = ""

    @property
    def is_met(self) -> bool | None:
        """Whether the target is met; None without a target."""
        if not self.target:
            return None
        relation, limit = self.target.split()
        return self.ratio >= float(limit) if relation == ">=" else self.ratio <= float(limit)


def compared(
    name: str,
    ours: Sequence[float],
    baseline: Sequence[float],
    *,
    baseline_is: str,
    unit: str,
    ratio_is: str = "baseline / ours",
    target: str = "",
    note: str = "",
) -> Row:
    """Return the row of two variants' values, one per round, or a single value each if counted."""
    above, below = (baseline, ours) if ratio_is == "baseline / ours" else (ours, baseline)
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    ratio = statistics.median(ratios)
    return Row(
        name=name,
        ours=statistics.median(ours),
        baseline=statistics.median(baseline),
        baseline_is=baseline_is,
        unit=unit,
        ratio=ratio,
        ratio_is=ratio_is,
        noise=(max(ratios) - min(ratios)) / 2 / ratio,
        target=target,
        note=note,
    )


def interleaved(
    variants: Mapping[str, Variant],
    *,
    rounds: int,
    clock: Callable[[], float] = time.process_time,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Return the seconds of each variant in each round; every other round runs them in the opposite order.

    The variants alternate in one process, so that other load on the machine affects all of them.

    Args:
        clock: process time by default: all threads, without waits for the machine's other work.
        warm_up: run each variant once before, uncounted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    if warm_up:
        for variant in variants.values():
            variant()
    for number in range(rounds):
        for name in list(variants)[:: -1 if number % 2 else 1]:
            gc.collect()
            start = clock()
            variants[name]()
            seconds[name].append(clock() - start)
    return seconds


def run_program(name: str, command: Sequence[str | Path], environment: Mapping[str, str]) -> None:
    """Run `command` in the checkout, with `environment` added to this one; quietly, unless it fails.

    Raises:
        RuntimeError: it failed; one line that begins with `name`, after the end of its output.
    """
    process = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        print(process.stdout[-2000:] + process.stderr[-4000:], file=sys.stderr)
        raise RuntimeError(f"{name} failed with {process.returncode}")


def peak_megabytes(variant: Variant) -> float:
    """Return the peak resident memory of `variant` beyond the memory before it, MB; in a forked child (Linux).

    The allocator may keep memory that an earlier variant freed, which would hide a later variant's need. So glibc
    first returns its free memory, and each variant runs in its own child.
    """
    import torch

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # a forked process lacks the parent's threads
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            before = _resident_megabytes("VmRSS")
            variant()
            os.write(writing, str(_resident_megabytes("VmHWM") - before).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"the child that measures memory failed with status {status}")
    return float(answer)


def _resident_megabytes(field: str) -> float:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match, field
    return int(match[1]) * 1024 / 1e6


def number(value: float) -> str:
    """Format with three significant digits; with an exponent only below 0.0001."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
