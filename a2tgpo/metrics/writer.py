"""Write a run's metrics to metrics.jsonl and to TensorBoard, and show progress in the terminal."""

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
from a2tgpo.io.errors import ConfigError
from a2tgpo.metrics.layout import TENSORBOARD_LAYOUT

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

PROGRESS_METRICS = {"reward": "reward/mean", "EM": "reward/em", "tok/s": "speed/tokens_per_s"}
"""Label on the progress line -> the metric whose value follows it."""


class MetricWriter:
    """Write the metrics of one run. On ranks where `enabled` is False, all methods do nothing.

    If `log` is called several times for one step, the step's line in metrics.jsonl has the metrics of all these
    calls. When a call returns, its data is in the file, so a crash of the process loses nothing.

    Args:
        run_dir: the run's folder, which is created if it is missing.
        total_steps: number of steps of the whole run, shown on the progress line.
        enabled: True on the one rank that writes.
        resume_step: the step from which the run resumes. Records of later steps are dropped. None: the run is new,
            and the records of an earlier run are moved to `previous_N/`.
        stream: where progress is shown. None: stderr. If `stream` is not a terminal, each step prints a plain line.
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
        """Record `metrics` as metrics of `step`. A call must not have a smaller step than an earlier call.

        A value that is not finite becomes null in metrics.jsonl.
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
        """Record the finite values of `values` as a histogram in TensorBoard. If there are none, do nothing."""
        if not self.enabled:
            return
        finite = [float(value) for value in values if math.isfinite(value)]
        if finite:
            # torch's writer does not accept lists.
            import numpy as np

            with naming(self._board_folder):
                self._board.add_histogram(name, np.asarray(finite, dtype=np.float64), step)

    def log_hyperparameters(
        self, values: Mapping[str, bool | int | float | str], metrics: Sequence[str]
    ) -> None:
        """Record the run's settings `values`. TensorBoard shows the settings next to the last values of `metrics`."""
        if self.enabled:
            from torch.utils.tensorboard.summary import hparams

            # SummaryWriter.add_hparams would show the metrics as those of an additional run.
            for summary in hparams(dict(values), dict.fromkeys(metrics, 0.0)):
                self._board._get_file_writer().add_summary(summary)

    def log_text(self, step: int, name: str, text: str) -> None:
        """Record `text` in TensorBoard, in a monospaced font and without interpreting it as Markdown."""
        if self.enabled:
            # Make the text an indented code block, because it could contain the end of a fenced block.
            indented = "\n".join("    " + line for line in text.splitlines())
            with naming(self._board_folder):
                self._board.add_text(name, indented, step)

    def print(self, text: str) -> None:
        """Print `text` as a line above the progress line."""
        if self.enabled:
            if self._bar is not None:
                self._bar.clear()
            print(text, file=self._stream, flush=True)
            if self._bar is not None:
                self._bar.refresh()

    def close(self) -> None:
        """Write buffered records and end the progress line."""
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
            # If `smoothing` is small, tqdm estimates the remaining time mostly from the run's average.
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
        """Return the estimated remaining time as text. Return "" before the first step and after the last step."""
        done, left = step - self._first_step, self._total_steps - step
        if done < 1 or left < 1:
            return ""
        seconds = (time.monotonic() - self._start) / done * left
        return f"  left {datetime.timedelta(seconds=round(seconds))}"


class _MetricsFile:
    """The file metrics.jsonl, which has one JSON object for each step, in the order of the steps."""

    def __init__(self, run_dir: Path, resume_step: int | None):
        self._path = path = run_dir / METRICS_FILE
        if resume_step is None:
            _set_aside(run_dir)
        kept = [] if resume_step is None else [r for r in read_metrics(path) if r["step"] <= resume_step]
        # Replace the file atomically, because a crash must not lose the lines that are kept.
        write_text(path, "".join(_line(record) for record in kept))
        self._last: dict = kept[-1] if kept else {}
        # Do not buffer. With a buffer, if the write of a line fails, closing the file would write the line again.
        self._handle = path.open("r+b", buffering=0)
        self._last_start = self._handle.seek(0, os.SEEK_END) - len(
            _line(self._last).encode() if kept else b""
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        last_step = self._last.get("step")
        if last_step is not None and step < last_step:
            raise ValueError(
                f"metrics of step {step} after those of step {last_step}: steps must not decrease"
            )
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
        """Append `line` to the file. If the write fails, remove the part of `line` that was written."""
        try:
            while line:
                line = line[self._handle.write(line) :]
        except OSError:
            self._handle.truncate(self._last_start)
            raise

    def close(self) -> None:
        self._handle.close()


def read_metrics(path: str | Path) -> list[dict]:
    """Return the records in the metrics.jsonl at `path`. If the file does not exist, return an empty list.

    A malformed last line is ignored, because a crash may have truncated it.

    Raises:
        ConfigError: if another line is malformed.
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
            raise ConfigError(f"{path} line {number}: not a record of a step; remove the line")
        records.append(record)
    return records


def _is_record(record: object) -> bool:
    """Return whether `record` is a dict that has a step and whose values are all numbers or None."""
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
