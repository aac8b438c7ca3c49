"""Run a check in separate processes, one per rank, and end them at the time limit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from gpu_checks.bench import Row, Settings

TOOL = Path(__file__).parents[1] / "gpu_check.py"
GRACE_S = 5.0
"""After one rank has failed, the other ranks get this many seconds to write their messages."""


def run_check(
    name: str, environments: list[dict[str, str]], *, settings: Settings, work: Path, timeout_s: float
) -> list[Row]:
    """Run the ranks of check `name`, and return its rows, with a FAIL row if a rank fails or does not end in time."""
    logs = [work / f"{name}.{environment['RANK']}.log" for environment in environments]
    arguments = ["--one", name, "--work", str(work), "--settings", settings.dumps()]
    processes = []
    for environment, log in zip(environments, logs, strict=True):
        with log.open("w") as stream:
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(TOOL), *arguments],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    try:
        fault = _wait(processes, logs, timeout_s)
    finally:  # also runs if a signal ends this process
        _end(processes)
    file = work / f"{name}.json"
    rows = [Row(**row) for row in json.loads(file.read_text())] if file.exists() else []
    if fault:
        rows.append(Row(check=name, name=name, status="FAIL", note=fault))
    return rows


def _wait(processes: list[subprocess.Popen], logs: list[Path], timeout_s: float) -> str:
    """Wait for all processes. Return a line that describes the first failure, or "" if all succeeded."""
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
    """Kill all remaining processes in each rank's session, because a rank's children may still run when the rank has
    ended.
    """
    for process in processes:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        finally:
            process.wait()


def _describe(process: subprocess.Popen, log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    # Look for the exception's line, which begins with a name and a colon. More lines may follow it.
    errors = [
        line for line in lines if line.split(":")[0].endswith(("Error", "Exception")) or "error:" in line[:60]
    ]
    last = (errors or lines or ["no output"])[-1]
    return f"{last[:240]} (exit code {process.returncode}; --keep-logs keeps {log.name})"
