"""Writing a run's metrics: metrics.jsonl, TensorBoard, and a live line in the terminal."""

from __future__ import annotations

import datetime
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from a2tgpo.io.atomic_file import naming, write_text
from a2tgpo.metrics.layout import TENSORBOARD_LAYOUT

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

PROGRESS_METRICS = {"reward": "reward/mean", "EM": "reward/em", "tok/s": "speed/tokens_per_s"}
"""Label on the progress line -> metric."""


class MetricWriter:
    """Records of one run, written by one rank; on the others, made with `enabled=False`, every call does nothing.

    A step may be logged in several calls: its line in metrics.jsonl then holds them all. Every call is on
    disk when it returns, so a crash loses nothing.

    Args:
        run_dir: the run's folder; created.
        total_steps: steps of the whole run, for the progress line.
        enabled: True on the one rank that writes.
        resume_step: last step that is kept when a run goes on; what was logged after it is dropped. None: a
            new run; what an earlier one left in the folder is moved to `previous_N/`.
        stream: the terminal; None: stderr. Where it is no terminal, a plain line is printed for each step.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        total_steps: int,
        enabled: bool = True,
        resume_step: int | None = None,
        stream: TextIO | None = None,
    ):
        self.enabled = enabled
        if not enabled:
            return
        self._total_steps = total_steps
        self._stream = stream or sys.stderr
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._jsonl = _MetricsFile(run_dir, resume_step)
        self._board_folder = run_dir / TENSORBOARD_FOLDER
        self._board = _open_board(self._board_folder, resume_step)
        self._bar = self._open_bar(resume_step or 0)
        self._first_step, self._start = resume_step or 0, time.monotonic()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record `metrics` of `step`, which is never smaller than in an earlier call.

        A value that is not finite is null in metrics.jsonl.
        """
        if not self.enabled:
            return
        values = {name: float(value) for name, value in metrics.items()}
        self._jsonl.write(step, values)
        with naming(self._board_folder):
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        self._show(step, values)

    def log_histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        """Record the finite ones of `values` as a histogram in TensorBoard; nothing if there is none."""
        if not self.enabled:
            return
        finite = [float(value) for value in values if math.isfinite(value)]
        if finite:
            # numpy arrays only: torch's writer takes no lists
            import numpy as np

            with naming(self._board_folder):
                self._board.add_histogram(name, np.asarray(finite, dtype=np.float64), step)

    def log_hyperparameters(
        self, values: Mapping[str, bool | int | float | str], metrics: Sequence[str]
    ) -> None:
        """Record the run's settings for TensorBoard's comparison of runs, to be seen with the last of `metrics`."""
        if self.enabled:
            from torch.utils.tensorboard.summary import hparams

            # Not add_hparams: that would write the metrics as values of a run of its own.
            for summary in hparams(dict(values), dict.fromkeys(metrics, 0.0)):
                self._board._get_file_writer().add_summary(summary)

    def log_text(self, step: int, name: str, text: str) -> None:
        """Record `text` in TensorBoard as it is (monospaced, not read as Markdown)."""
        if self.enabled:
            # Indentation makes a code block whatever the text contains; a fence could be closed by the
            # text itself.
            indented = "\n".join("    " + line for line in text.splitlines())
            with naming(self._board_folder):
                self._board.add_text(name, indented, step)

    def print(self, text: str) -> None:
        """Print above the progress line without tearing it."""
        if self.enabled:
            if self._bar is not None:
                self._bar.clear()
            print(text, file=self._stream, flush=True)
            if self._bar is not None:
                self._bar.refresh()

    def close(self) -> None:
        """Write out what is buffered and end the progress line."""
        if self.enabled:
            self._jsonl.close()
            self._board.close()
            if self._bar is not None:
                self._bar.close()

    def _open_bar(self, initial: int) -> tqdm | None:
        if not self._stream.isatty():
            return None
        from tqdm import tqdm

        return tqdm(
            total=self._total_steps,
            initial=initial,
            file=self._stream,
            desc="step",
            dynamic_ncols=True,
            # Steps are few and slow: the estimate follows the run's average.
            smoothing=0.1,
            bar_format="{desc} {n_fmt}/{total_fmt} |{bar:20}| {elapsed} elapsed, {remaining} left {postfix}",
        )

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        shown = {label: _short(values[name]) for label, name in PROGRESS_METRICS.items() if name in values}
        if self._bar is not None:
            self._bar.update(max(0, step - self._bar.n))
            if shown:
                self._bar.set_postfix(shown)
        elif shown:
            line = "  ".join(f"{label} {value}" for label, value in shown.items())
            print(
                f"step {step}/{self._total_steps}  {line}{self._time_left(step)}",
                file=self._stream,
                flush=True,
            )

    def _time_left(self, step: int) -> str:
        """An estimate by this start's mean time of a step, evaluations and checkpoints included."""
        done, left = step - self._first_step, self._total_steps - step
        if done < 1 or left < 1:
            return ""
        seconds = (time.monotonic() - self._start) / done * left
        return f"  left {datetime.timedelta(seconds=round(seconds))}"


class _MetricsFile:
    """metrics.jsonl: one object a step, ascending."""

    def __init__(self, run_dir: Path, resume_step: int | None):
        self._path = path = run_dir / METRICS_FILE
        if resume_step is None:
            _set_aside(run_dir)
        kept = [] if resume_step is None else [r for r in read_metrics(path) if r["step"] <= resume_step]
        # A crash while the kept lines are written back must not lose them.
        write_text(path, "".join(_line(record) for record in kept))
        self._last: dict = kept[-1] if kept else {}
        # Unbuffered: a line that could not be written must not come up again when the file is closed.
        self._handle = path.open("r+b", buffering=0)
        self._last_start = self._handle.seek(0, os.SEEK_END) - len(
            _line(self._last).encode() if kept else b""
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        last_step = self._last.get("step")
        if last_step is not None and step < last_step:
            raise ValueError(f"metrics of step {step} after those of step {last_step}: steps must not fall")
        cleaned = {name: value if math.isfinite(value) else None for name, value in values.items()}
        if step == last_step:
            self._last |= cleaned
            self._handle.seek(self._last_start)
            self._handle.truncate()
        else:
            self._last_start = self._handle.seek(0, os.SEEK_END)
            self._last = {"step": step, **cleaned}
        with naming(self._path):
            self._append(_line(self._last).encode())

    def _append(self, line: bytes) -> None:
        """Write a whole line or none of it."""
        try:
            while line:
                line = line[self._handle.write(line) :]
        except OSError:
            self._handle.truncate(self._last_start)
            raise

    def close(self) -> None:
        self._handle.close()


def read_metrics(path: str | Path) -> list[dict]:
    """The records of a metrics.jsonl, one a step; empty if there is none.

    A last line cut short by a crash is left out.

    Raises:
        ValueError: if another line is broken.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not _is_record(record):
            if number == len(lines):
                break
            raise ValueError(f"{path} line {number}: not a record of a step; remove the line")
        records.append(record)
    return records


def _is_record(record: object) -> bool:
    """A step, and numbers that a float holds; None stands for one that was not finite."""
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return False
    return all(
        value is None
        or isinstance(value, float)
        or (isinstance(value, int) and abs(value) <= sys.float_info.max)
        for value in record.values()
    )


def _set_aside(run_dir: Path) -> None:
    left = [run_dir / name for name in (METRICS_FILE, TENSORBOARD_FOLDER) if (run_dir / name).exists()]
    if not left:
        return
    number = 1
    while (run_dir / f"previous_{number}").exists():
        number += 1
    folder = run_dir / f"previous_{number}"
    folder.mkdir()
    for path in left:
        path.rename(folder / path.name)


def _open_board(folder: Path, resume_step: int | None) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(str(folder), purge_step=None if resume_step is None else resume_step + 1)
    board.add_custom_scalars(TENSORBOARD_LAYOUT)
    return board


def _line(record: Mapping[str, object]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"
