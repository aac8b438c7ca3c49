"""Run every fault at every point of a step in real runs on this machine, and write the table in docs/reliability.md.

    python tests/fault_table.py [--out docs/reliability.md] [--jobs 2] [--only PART,PART,...] [--work FOLDER]

The program takes a quarter of an hour on two idle cores, and up to an hour on busy cores. For the full disk it mounts
a small tmpfs, which needs root. FOLDER keeps finished parts, so the same command resumes an interrupted table. Parts
without rows in FOLDER are reported as not run. With --only and without --work, the table is only printed. The exit
code is 1 if a row fails.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from faults import single_runs
from faults.chain import Fault, hangs, kills, run_chain, signals, steps_needed
from faults.harness import Row, start, write_inputs
from preloaded import VARIABLE
from preloaded.session import Session

ROOT = Path(__file__).resolve().parents[1]

BEGIN, END = "<!-- fault table: written by tests/fault_table.py -->", "<!-- end of the fault table -->"
CHAIN_FAULTS = 6
"""Number of consecutive faults in one run, which has at least one step for each fault."""


def chains() -> dict[str, list[Fault]]:
    """Return the faults by the name of their run."""
    wholes = {
        "kills0": kills(0),
        "kills1": kills(1),
        "hangs": hangs(),
        "term": signals("term"),
        "usr1": signals("usr1"),
    }
    return {
        f"{name}_{begin // CHAIN_FAULTS + 1}": faults[begin : begin + CHAIN_FAULTS]
        for name, faults in wholes.items()
        for begin in range(0, len(faults), CHAIN_FAULTS)
    }


def parts(config: Path, undisturbed: Path) -> dict[str, Callable[[], list[Row]]]:
    """Return the parts that can run in parallel, in the order of the table."""
    work: dict[str, Callable[[], list[Row]]] = {}
    for name, faults in chains().items():
        work[name] = functools.partial(
            run_chain,
            config,
            name,
            faults,
            undisturbed,
            steps=steps_needed(faults),
            damage=name.startswith("kills"),
        )
    for name in ("search_faults", "outage", "poisoned", "slow_rank", "full_disk", "taken_port"):
        work[name] = functools.partial(getattr(single_runs, name), config)
    work["clock_jumps"] = functools.partial(single_runs.clock_jumps, config, undisturbed)
    return work


def prepare(folder: Path) -> Path:
    """Make the inputs of all runs and the run without faults, unless they exist. Return the configuration."""
    config = folder / "config.yaml"
    if not (folder / "ready").exists():
        write_inputs(folder)
        steps = max(map(steps_needed, chains().values()))
        whole = start(config, "run.name=whole", f"run.steps={steps}", timeout_s=900)
        if whole.code:
            raise RuntimeError(f"the run without faults ended with {whole.code}: {whole.output[-2000:]}")
        (folder / "ready").touch()
    return config


def run_part(folder: Path, name: str, work: Callable[[], list[Row]]) -> None:
    """Write the part's rows to `folder`, unless an earlier start wrote them and all passed."""
    path = folder / f"{name}.rows.json"
    if (rows := read_rows(path)) and all(row.passed for row in rows):
        return
    shutil.rmtree(folder / name, ignore_errors=True)
    rows = work()
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1).replace(str(folder), "RUNS"))
    print(f"{name}: {sum(row.passed for row in rows)} of {len(rows)} rows pass", flush=True)


def read_rows(path: Path) -> list[Row]:
    return [Row(**row) for row in json.loads(path.read_text())] if path.exists() else []


def as_table(found: dict[str, list[Row]]) -> str:
    rows = [row for part in found.values() for row in part]
    ends = [row.end_s for row in rows if row.end_s is not None and row.fault.startswith("SIGKILL")]
    lines = [f"{sum(row.passed for row in rows)} of {len(rows)} rows pass."]
    if ends:
        lines[0] += (
            f" From a SIGKILL of one rank to the end of all: median {statistics.median(ends):.1f} s, "
            f"longest {max(ends):.1f} s."
        )
    if missing := [name for name, part in found.items() if not part]:
        lines[0] += f" Not run: {', '.join(missing)}."
    lines += ["", "| fault | point | outcome | |", "|---|---|---|---|"]
    for row in rows:
        outcome = " ".join(row.outcome.split()).replace("|", "/")
        lines.append(f"| {row.fault} | {row.point} | {outcome} | {'pass' if row.passed else '**FAIL**'} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "reliability.md")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, of two processes each")
    names = list(parts(Path(), Path()))
    parser.add_argument("--only", default="", help=f"some of {', '.join(names)}; comma-separated")
    parser.add_argument("--work", type=Path, help="folder of the runs and finished parts; default: a new one")
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else names
    if unknown := set(chosen) - set(names):
        parser.error(f"no part is called {', '.join(sorted(unknown))}; allowed: {', '.join(names)}")
    folder = (options.work or Path(tempfile.mkdtemp(prefix="faults-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"runs and finished parts: {folder}", flush=True)
    session = Session()
    os.environ[VARIABLE] = session.python
    try:
        config = prepare(folder)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    work = parts(config, folder / "whole")
    waiting = iter(chosen)

    def work_off() -> None:
        for name in waiting:
            run_part(folder, name, work[name])

    threads = [threading.Thread(target=work_off) for _ in range(options.jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    session.close()
    found = {name: read_rows(folder / f"{name}.rows.json") for name in names}
    table = as_table(found)
    if options.only and not options.work:
        print(table)
    else:
        before, _, rest = options.out.read_text().partition(BEGIN)
        options.out.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}")
    return 0 if all(found[name] and all(row.passed for row in found[name]) for name in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
