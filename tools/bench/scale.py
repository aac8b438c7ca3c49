"""Measure the work of one rank, per step and at the start, that depends on the number of ranks.

    python tools/bench/scale.py [--ranks 8,64,512,1024] [--real 2,4,8] [--page docs/performance.md]

A process plays rank 0 of a 72B model's layout (8 x tensor, 4 x pipeline from 64 ranks on, engines of 8
ranks): torch's fake process group creates the groups, and collectives return the data that peers would have sent, so
that this process does all of Python's work. A step has 1,024 trajectories of about 8,192 tokens at every size.
Collectives and bytes are counted; seconds are CPU seconds of Python on rank 0, without the network.

With --real, the quickstart takes three steps on these numbers of gloo processes on this machine, and the bench reads
the processes' resources.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from a2tgpo.io.program import program_parser
from a2tgpo.io.tables import markdown_table

ROOT = Path(__file__).resolve().parents[2]
RANK = Path(__file__).with_name("scale_rank.py")
START, END = "<!-- scale table: start -->", "<!-- scale table: end -->"
ROWS = {
    "groups": "process groups made by all ranks, of them with rank 0 in",
    "groups_s": "start: laying the ranks out, s",
    "facts_s": "start: rank 0 compares what all ranks see, s",
    "questions_s": "start: lengths of a rank's share of 20,000 prompts, s",
    "files": "connections of rank 0 at most, counted by formula",
    "host_mb": "host memory of the groups, MB",
    "exchange_s": "step: exchange, s",
    "exchange_mb": "step: exchange, sent by an engine's first rank, MB",
    "exchange_calls": "step: exchange, collectives",
    "metrics_s": "step: metrics and ranks' seconds, s",
    "metrics_kb": "step: metrics and ranks' seconds, received, kB",
    "record_s": "step: rollouts shown and handed to the writing thread, s",
    "record_calls": "step: metrics and rollouts, collectives",
    "step_s": "step: all of these, s",
}
"""Name in a rank's record -> label in the table."""
REAL_ROWS = {
    "open_files": "open files of the rank with most",
    "exchange_s": "exchange, mean of the fastest rank, s",
    "host_gib": "host memory of the largest rank, GiB",
}


def main() -> int:
    parser = program_parser(__doc__)
    parser.add_argument("--ranks", default="8,64,512,1024", help="numbers of ranks, one simulated")
    parser.add_argument("--real", default="", help="numbers of real processes, such as 2,4,8")
    parser.add_argument("--page", type=Path, help="replace the tables between the marks of this page")
    args = parser.parse_args()
    sizes = [int(size) for size in args.ranks.split(",") if size]
    tables = [table("one rank of", ROWS, {size: one_rank(size) for size in sizes})] if sizes else []
    if args.real:
        real = {int(size): real_ranks(int(size)) for size in args.real.split(",")}
        tables.append(table("real processes", REAL_ROWS, real))
    text = "\n".join(tables)
    print(text)
    if args.page is not None:
        head, rest = args.page.read_text(encoding="utf-8").split(START)
        tail = rest.split(END)[1]
        args.page.write_text(f"{head}{START}\n{text}{END}{tail}", encoding="utf-8")
    return 0


def one_rank(size: int) -> dict[str, float]:
    """Return the record of rank 0 of `size`, from a separate process."""
    done = subprocess.run(
        [sys.executable, str(RANK), str(size)],
        cwd=ROOT,
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"rank 0 of {size} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def real_ranks(size: int) -> dict[str, float]:
    """Run three steps of the quickstart on `size` processes."""
    with tempfile.TemporaryDirectory() as root:
        overrides = [
            "--resume",
            "none",
            f"run.root={root}",
            "run.name=scale",
            "run.steps=3",
            "evaluation.every=0",
            "evaluation.at_start=false",
            "checkpoint.every=0",
            "rollout.kv_cache_gib=0.1",
        ]
        process = subprocess.Popen(
            ["launch/local.sh", "-n", str(size), "configs/quickstart.yaml", *overrides],
            cwd=ROOT,
            env=_environment() | {"PYTHON": sys.executable},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        most_files = 0
        while True:
            try:
                output, _ = process.communicate(timeout=2)
                break
            except subprocess.TimeoutExpired:
                most_files = max(most_files, _open_files(process.pid))
        if process.returncode:
            raise RuntimeError(f"{size} ranks failed:\n{output[-3000:]}")
        lines = (Path(root) / "scale" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [json.loads(line) for line in lines]
    return {
        "open_files": most_files,
        "exchange_s": sum(step["time/exchange_min_s"] for step in steps) / len(steps),
        "host_gib": max(step["memory/host_gib"] for step in steps),
    }


def table(title: str, rows: dict[str, str], found: dict[int, dict[str, float]]) -> str:
    lines = [[words, *(_shown(record[name]) for record in found.values())] for name, words in rows.items()]
    return markdown_table([title, *(f"{size:,}" for size in found)], lines) + "\n"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_shown(item) for item in value)
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2g}"


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def _open_files(pid: int) -> int:
    """Return the largest number of open files of a process below `pid`."""
    most = 0
    for child in _below(pid):
        try:
            most = max(most, len(list(Path(f"/proc/{child}/fd").iterdir())))
        except OSError:  # the process has ended
            continue
    return most


def _below(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    found = [int(child) for child in children]
    return found + [grandchild for child in found for grandchild in _below(child)]


if __name__ == "__main__":
    sys.exit(main())
