"""Every fault at every point of a step, in real runs on this machine; the outcome goes into docs/reliability.md.

    python tools/fault_table.py [--out docs/reliability.md] [--jobs 2] [--only kills,hangs,signals,search,...]

Takes about half an hour on two cores. Mounts a small tmpfs for the full disk, which needs root. Exits with 1 if a row
fails. With --only the table is printed and not written.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "faults"))

import single_runs
from chain import Fault, hangs, kills, run_chain, signals, steps_needed
from harness import Row, start, write_inputs

BEGIN, END = "<!-- fault table: written by tools/fault_table.py -->", "<!-- end of the fault table -->"
CHAINS: dict[str, list[Fault]] = {
    "kills0": kills(0),
    "kills1": kills(1),
    "hangs": hangs(),
    "term": signals("term"),
    "usr1": signals("usr1"),
}


def jobs(config: Path, undisturbed: Path) -> dict[str, Callable[[], list[Row]]]:
    """What can run side by side."""
    work: dict[str, Callable[[], list[Row]]] = {}
    for name, faults in CHAINS.items():

        def chain(name: str = name, faults: list[Fault] = faults) -> list[Row]:
            steps = steps_needed(faults)
            return run_chain(config, name, faults, undisturbed, steps=steps, damage=name.startswith("kills"))

        work[name] = chain
    work["clock"] = lambda: single_runs.clock_jumps(config, undisturbed)
    for name in ("search_faults", "poisoned", "full_disk", "taken_port"):
        work[name] = functools.partial(getattr(single_runs, name), config)
    return work


def as_table(rows: list[Row], seconds: float) -> str:
    lines = [
        f"{sum(row.passed for row in rows)} of {len(rows)} rows pass; {seconds / 60:.0f} minutes.",
        "",
        "| fault | point | outcome | |",
        "|---|---|---|---|",
    ]
    for row in rows:
        outcome = " ".join(row.outcome.split()).replace("|", "/")
        lines.append(f"| {row.fault} | {row.point} | {outcome} | {'pass' if row.passed else '**FAIL**'} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "reliability.md")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, of two processes each")
    parser.add_argument(
        "--only", default="", help=f"some of {', '.join(jobs(Path(), Path()))}; comma-separated"
    )
    options = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        config = write_inputs(Path(folder))
        steps = max(steps_needed(faults) for faults in CHAINS.values())
        whole = start(config, "run.name=whole", f"run.steps={steps}", timeout_s=600)
        if whole.code:
            print(
                f"fault_table: the run without faults ended with {whole.code}: {whole.output[-2000:]}",
                file=sys.stderr,
            )
            return 1
        work = jobs(config, Path(folder) / "whole")
        chosen = options.only.split(",") if options.only else list(work)
        with ThreadPoolExecutor(options.jobs) as pool:
            rows = [row for found in pool.map(lambda name: work[name](), chosen) for row in found]
    table = as_table(rows, time.monotonic() - begin)
    root = str(folder)
    table = table.replace(root, "RUNS")
    print(table)
    if not options.only:
        before, _, rest = options.out.read_text().partition(BEGIN)
        options.out.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}")
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
