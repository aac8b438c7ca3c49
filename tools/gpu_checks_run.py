"""How tools/gpu_check.py runs a check: in processes of its own, one a rank, with an end to its patience."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOOL = Path(__file__).with_name("gpu_check.py")
GRACE_S = 5.0
"""How long the other ranks of a check go on after one has failed: it should be the one whose message is shown."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    name: str
    status: str
    """PASS | FAIL | SKIP."""
    measured: float | None = None
    limit: float | None = None
    """What `measured` was held to."""
    relation: str = ""
    """How: `<=` or `>=`."""
    unit: str = ""
    note: str = ""
    """Why it failed or was skipped; of a PASS, what else was seen."""


@dataclass(kw_only=True)
class Bench:
    """What a check is given: where to write, and who it is; rank 0's rows are the check's."""

    file: Path
    work: Path
    """A folder to write to. Ranks may share it or not: each writes under names of its own."""
    rank: int
    world_size: int
    min_bus_gb_s: float | None
    rows: list[Row] = field(default_factory=list)

    def at_most(self, name: str, measured: float, limit: float, unit: str = "", note: str = "") -> None:
        """PASS if `measured` <= `limit`; a NaN fails."""
        status = "PASS" if measured <= limit else "FAIL"
        self._add(
            Row(name=name, status=status, measured=measured, limit=limit, relation="<=", unit=unit, note=note)
        )

    def at_least(self, name: str, measured: float, limit: float, unit: str = "", note: str = "") -> None:
        """PASS if `measured` >= `limit`; a NaN fails."""
        status = "PASS" if measured >= limit else "FAIL"
        self._add(
            Row(name=name, status=status, measured=measured, limit=limit, relation=">=", unit=unit, note=note)
        )

    def skip(self, name: str, reason: str) -> None:
        self._add(Row(name=name, status="SKIP", note=reason))

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        if self.rank == 0:  # written at once: what was measured before a hang is kept
            partial = self.file.with_suffix(".partial")
            partial.write_text(json.dumps([dataclasses.asdict(each) for each in self.rows]))
            partial.replace(self.file)


def run_check(
    name: str, environments: list[dict[str, str]], *, arguments: list[str], work: Path, timeout_s: float
) -> list[Row]:
    """Start the check's ranks and wait for them; its rows, with a FAIL at the end if a rank failed or hung."""
    logs = [work / f"{name}.{environment['RANK']}.log" for environment in environments]
    processes = []
    for environment, log in zip(environments, logs, strict=True):
        with log.open("w") as stream:
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(TOOL), "--one", name, "--work", str(work), *arguments],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    try:
        fault = _wait(processes, logs, timeout_s)
    finally:  # also where this process is told to end
        _end(processes)
    file = work / f"{name}.json"
    rows = [Row(**row) for row in json.loads(file.read_text())] if file.exists() else []
    if fault:
        rows.append(Row(name=name, status="FAIL", note=fault))
    return rows


def _wait(processes: list[subprocess.Popen], logs: list[Path], timeout_s: float) -> str:
    """Wait for all; what went wrong in one line, empty if nothing."""
    deadline, fault = time.monotonic() + timeout_s, ""
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        failed = [i for i, process in enumerate(processes) if process.poll()]
        if failed and not fault:
            fault = _describe(processes[failed[0]], logs[failed[0]])
            deadline = min(deadline, time.monotonic() + GRACE_S)
        time.sleep(0.05)
    if not fault:
        failed = [i for i, process in enumerate(processes) if process.poll()]
        if failed:
            fault = _describe(processes[failed[0]], logs[failed[0]])
        elif any(process.poll() is None for process in processes):
            fault = f"still running after {timeout_s:g} s (--timeout-s)"
    return fault


def _end(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _describe(process: subprocess.Popen, log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    # Interpreters and libraries may say more after the exception: its line begins with a name and a colon.
    errors = [
        line for line in lines if line.split(":")[0].endswith(("Error", "Exception")) or "error:" in line[:60]
    ]
    last = (errors or lines or ["it wrote nothing"])[-1]
    return f"{last[:240]} (exit code {process.returncode}; --keep-logs keeps {log.name})"


def table(rows: list[Row]) -> str:
    """The rows as text, a line each."""
    lines = []
    for row in rows:
        held = ""
        if row.measured is not None:
            held = f"{row.measured:.4g} {row.relation} {row.limit:.4g} {row.unit}".rstrip()
        lines.append(f"{row.status}  {row.name:<46}  {held:<28}  {row.note}".rstrip())
    return "\n".join(lines)


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(row) for row in rows]
