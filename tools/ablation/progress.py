"""Show the progress of a comparison's runs."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm
from warm_starts import WarmStart

from runs import Run, RunResult


@dataclass(kw_only=True)
class Job:
    """A run or a warm start whose processes have been started."""

    task: Run | WarmStart
    slot: int
    process: subprocess.Popen


class Progress:
    """Shows the progress of all runs: in a terminal as a bar, and elsewhere as a line for every run that ends."""

    def __init__(self, runs: Sequence[Run], waiting: Sequence[Run], total_steps: int):
        self._total_runs, self._ended_runs = len(runs), len(runs) - len(waiting)
        self._seen = {run.name: (0.0, run.step()) for run in runs}
        """{run: (modification time of its metrics file, number of steps in that file)}."""
        self._total = total_steps
        self._first_done = self._done = sum(step for _, step in self._seen.values())
        self._start = time.monotonic()
        self._bar = tqdm(
            total=total_steps,
            initial=self._done,
            desc="steps",
            dynamic_ncols=True,
            disable=None,  # disables the bar if stderr is not a terminal
            bar_format="{desc} {n_fmt}/{total_fmt} |{bar:20}| {elapsed} elapsed, {remaining} left {postfix}",
        )

    def look(self, jobs: Sequence[Job]) -> None:
        """Add to the bar the steps that `jobs` have completed since the last call."""
        for run in [job.task for job in jobs if isinstance(job.task, Run)]:
            changed, steps = self._seen[run.name]
            with contextlib.suppress(
                OSError, ValueError
            ):  # the file is just being written, or does not exist yet
                if (now := run.metrics_file.stat().st_mtime) != changed:
                    step = run.step()
                    self._seen[run.name] = (now, step)
                    self._done += step - steps
                    self._bar.update(step - steps)
        self._bar.set_postfix_str(", ".join(job.task.name for job in jobs), refresh=False)

    def end(self, result: RunResult) -> None:
        """Print a line that says how a run ended."""
        self._ended_runs += 1
        scores = [record["evaluation/em"] for record in result.evaluations()]
        became = f"held-out EM {scores[0]:.3f} to {scores[-1]:.3f}" if result.is_finished else result.fault
        made = self._done - self._first_done
        to_do = self._total - self._done
        seconds = (time.monotonic() - self._start) / made * to_do if made else 0.0
        left = f"; about {seconds / 60:.0f} min left" if made and to_do else ""
        line = f"[{self._ended_runs}/{self._total_runs}] {result.run.name} {result.status}: {became}{left}"
        tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
