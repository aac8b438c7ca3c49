"""Measure `make quickstart` in a fresh clone of this checkout, from the empty environment to the curves.

The clone has the commits of this checkout, not its uncommitted changes. pip takes the packages from its cache if they
are there. The baseline of the whole command is the goal of 4 minutes on two cores.

The bench takes about 5 minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure

GOAL_S = 240.0
STAGES = {
    "environment": " -m venv ",
    "questions and model": "tools/prepare_data.py",
    "warm start": "launch/warmstart.py",
    "training": "configs/quickstart.yaml --resume none",
    "curves": "tools/plot_run.py",
}
"""{stage: text of the first line that make prints for it}, in the order of the stages."""
LEFT_OUT = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHON", "VENV", "MAKEFLAGS", "MFLAGS", "MAKELEVEL")
"""Environment variables of this process that would change what the clone does."""


def rows() -> list[measure.Row]:
    with tempfile.TemporaryDirectory() as root:
        clone = Path(root, "a2tgpo")
        subprocess.run(["git", "clone", "--quiet", measure.ROOT, clone], check=True)
        seconds = timed_stages(clone)
    whole = sum(seconds.values())
    made = [
        measure.compared(
            f"make quickstart in a fresh clone: {stage}",
            [took],
            [whole],
            baseline_is="the whole command",
            unit="s",
            ratio_is="ours / baseline",
        )
        for stage, took in seconds.items()
    ]
    made.append(
        measure.compared(
            "make quickstart in a fresh clone",
            [whole],
            [GOAL_S],
            baseline_is="the goal",
            unit="s",
            ratio_is="ours / baseline",
            target="<= 1",
        )
    )
    return made


def timed_stages(clone: Path) -> dict[str, float]:
    """Run `make quickstart` in `clone`. Return {stage: its wall seconds}.

    Raises:
        RuntimeError: if the command failed, after printing the end of its output, or if it left out a stage.
    """
    environment = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
    starts: dict[str, float] = {}
    lines: list[str] = []
    with subprocess.Popen(
        ["make", "quickstart"],
        cwd=clone,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            for stage, mark in STAGES.items():
                if mark in line:
                    starts.setdefault(stage, time.monotonic())
    end = time.monotonic()
    if process.returncode:
        print("".join(lines[-60:]), file=sys.stderr)
        raise RuntimeError(f"make quickstart failed with {process.returncode}")
    if missing := STAGES.keys() - starts.keys():
        raise RuntimeError(f"make quickstart printed no line of {', '.join(sorted(missing))}")
    ends = [*list(starts.values())[1:], end]
    return {stage: after - start for (stage, start), after in zip(starts.items(), ends, strict=True)}
