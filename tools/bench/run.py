"""Run the benches, each in its own process, and write their rows into the table of docs/performance.md.

    python tools/bench/run.py [BENCH ...] [--out runs/bench] [--page docs/performance.md] [--table-only]

Without a BENCH, the program runs all benches, in some 40 minutes on two cores. The table keeps the lines of
benches that do not run. The exit code is 1 if a bench fails. A missed target is shown in the table, and is not a
failure.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from measure import ROOT, Row, number

HERE = Path(__file__).parent
BENCHES = (
    *("advantage", "loss", "packing", "gain", "refit", "train_step"),
    *("rollout", "assignment", "partial", "whole_step", "record", "start_up"),
    "quickstart",
)
"""The benches in the order of the table. Each bench is a module of this name in this folder."""
TIMES = ("s", "CPU s")
"""Units of rows that are not counts."""
START, END = "<!-- bench table: start -->", "<!-- bench table: end -->"
HEADER = ("| bench | what | ours | baseline | ratio | noise | target |", "|---|---|---|---|---|---|---|")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="benches:\n" + "\n".join(f"  {name:12}{purpose(name)}" for name in BENCHES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("benches", nargs="*", metavar="BENCH", help="default: all of those below")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the records")
    parser.add_argument(
        "--page", type=with_table, default=ROOT / "docs/performance.md", help="file with the table"
    )
    parser.add_argument("--table-only", action="store_true", help="write the table from existing records")
    args = parser.parse_args()
    if unknown := set(args.benches) - set(BENCHES):
        parser.error(f"no bench called {', '.join(sorted(unknown))}; there are {', '.join(BENCHES)}")
    failed = []
    for name in args.benches or BENCHES:
        record = args.out / f"{name}.json"
        if not args.table_only and not run(name, record):
            failed.append(name)
        elif record.exists():
            rows = [Row(**row) for row in json.loads(record.read_text(encoding="utf-8"))["rows"]]
            write_rows(args.page, name, rows)
    if failed:
        print(f"error: {', '.join(failed)} failed", file=sys.stderr)
    return 1 if failed else 0


def with_table(text: str) -> Path:
    page = Path(text)
    if not page.is_file() or START not in page.read_text(encoding="utf-8"):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a page with the lines {START} and {END}")
    return page


def purpose(bench: str) -> str:
    """Return the first line of the bench's docstring, which is read without importing the bench."""
    text = ast.get_docstring(ast.parse((HERE / f"{bench}.py").read_text(encoding="utf-8"))) or ""
    return text.splitlines()[0]


def run(bench: str, record: Path) -> bool:
    """Run a bench, which writes its record to `record`. Return whether the bench completed."""
    start = time.monotonic()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    print(f"== {bench}", flush=True)
    code = subprocess.run(
        [sys.executable, str(HERE / "one_bench.py"), bench, str(record)],
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    ).returncode
    print(f"== {bench}: {time.monotonic() - start:.0f} s, exit code {code}", flush=True)
    return code == 0


def write_rows(page: Path, bench: str, rows: list[Row]) -> None:
    """Replace the bench's old rows in the table of `page`, or insert the rows in the order of `BENCHES`."""
    text = page.read_text(encoding="utf-8")
    head, rest = text.split(START)
    table, tail = rest.split(END)
    lines: dict[str, list[str]] = {name: [] for name in BENCHES}
    for line in table.strip().splitlines()[len(HEADER) :]:
        lines.setdefault(line.split("|")[1].strip(" `"), []).append(line)
    lines[bench] = [table_line(bench, row) for row in rows]
    body = [*HEADER, *(line for name in BENCHES for line in lines[name])]
    page.write_text(head + START + "\n" + "\n".join(body) + "\n" + END + tail, encoding="utf-8")


def table_line(bench: str, row: Row) -> str:
    verdict = {None: "", True: f"{row.target}: met", False: f"{row.target}: **not met**"}[row.is_met]
    cells = (
        f"`{bench}`",
        row.name + (f" ({row.note})" if row.note else ""),
        f"{number(row.ours)} {row.unit}",
        f"{number(row.baseline)} {row.unit}, {row.baseline_is}",
        f"{number(row.ratio)} {row.ratio_is}",
        f"± {row.noise:.0%}" if row.noise else "one run" if row.unit in TIMES else "counted",
        verdict.replace(">=", "≥").replace("<=", "≤"),
    )
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
