"""Run one bench in this process, print its rows and write its record. run.py starts this program for every bench.

python tools/bench/one_bench.py BENCH RECORD
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from measure import Row, number


def main(bench: str, record: str) -> None:
    start, before = time.monotonic(), machine()
    rows = importlib.import_module(bench).rows()
    for row in rows:
        print(described(row), flush=True)
    found = {
        "bench": bench,
        "machine": before,
        "seconds": round(time.monotonic() - start, 1),
        "rows": [asdict(row) for row in rows],
    }
    Path(record).parent.mkdir(parents=True, exist_ok=True)
    Path(record).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """Return a description of this machine."""
    names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 1),
    }


def described(row: Row) -> str:
    verdict = {None: "", True: f", target {row.target}: met", False: f", target {row.target}: NOT met"}
    return (
        f"{row.name}: {number(row.ratio)} ({row.ratio_is}) ± {row.noise:.0%}; ours {number(row.ours)} {row.unit}, "
        f"{row.baseline_is} {number(row.baseline)} {row.unit}{verdict[row.is_met]}"
        + (f" [{row.note}]" if row.note else "")
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
