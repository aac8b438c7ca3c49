"""Measure variants of a computation in alternating rounds, and compute the table row that compares two variants.

A bench is a module in this folder that defines `rows() -> list[Row]` and that run.py lists.
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
    """One line of the table, which compares this project with a baseline from the same run."""

    name: str
    """The name of the measured quantity, and the size of its inputs."""
    ours: float
    baseline: float
    baseline_is: str
    unit: str
    """The unit of `ours` and `baseline`. "CPU s" is user and system time of the process, and "s" is wall time."""
    ratio: float
    """Median over the rounds of the ratio that `ratio_is` defines."""
    ratio_is: str
    """Either `baseline / ours` or `ours / baseline`."""
    noise: float
    """Half the range of the rounds' ratios, divided by their median. It is 0 if the values are counts, or if
    there was one round."""
    target: str = ""
    """The limit for `ratio`, such as ">= 200" or "<= 0.03", or "" if there is no target."""
    note: str = ""

    @property
    def is_met(self) -> bool | None:
        """Whether `ratio` meets the target, or None if there is no target."""
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
    """Return the row that compares two variants. Each variant has one value per round, or one count."""
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
    """Run all variants in every round, and return each variant's seconds in each round.

    The variants alternate in one process, so that other load on the machine affects all variants equally. Every
    second round reverses the order.

    Args:
        clock: returns seconds. The default clock counts the CPU time of all threads, which excludes waits for
            other programs.
        warm_up: whether to run each variant once before the first round, without measuring.
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
    """Run `command` in the checkout, with `environment` added to this process's environment, and hide the output.

    Raises:
        RuntimeError: if the command failed, after printing the end of its output.
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
    """Run `variant` in a forked child on Linux. Return how many MB of resident memory `variant` adds at its peak.

    The allocator may keep memory that an earlier variant freed, so glibc first returns its free memory to the system.
    """
    import torch

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # the parent's threads do not exist in a forked process
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
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
    """Format `value` with three significant digits. Only values below 0.0001 get an exponent."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
