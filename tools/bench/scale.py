"""Measure the part of one rank's work that depends on the number of ranks, in a step and at start-up.

    python tools/bench/scale.py [--ranks 8,64,512,1024] [--real 2,4,8] [--page docs/performance.md]

One process plays rank 0 of a 72B model's layout: tensor parallelism of 8, pipeline parallelism of 4 if there are at
least 64 ranks, and engines of 8 ranks. Process groups are torch's fake groups. Simulated collectives return the data
that other ranks would have sent, so this process runs all the Python code of rank 0. A step has 1,024 trajectories of
about 8,192 tokens for any number of ranks. The seconds are CPU seconds on rank 0, without the network.

With --real, the bench runs three steps of the quickstart on each given number of gloo processes on this machine, and
measures the resources that the processes use.
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
"""{name of a value in rank 0's record: label in the table}."""
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
    """Run scale_rank.py, which plays rank 0 of `size` ranks, and return its record."""
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
    """Run three steps of the quickstart on `size` processes, and return the values of `REAL_ROWS`."""
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
    """Return the largest number of open files that any descendant process of `pid` has."""
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
