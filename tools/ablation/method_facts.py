"""Compare the advantages of all methods on the same recorded trajectories, without any training.

    python tools/ablation/method_facts.py RUN_DIR [RUN_DIR ...]

RUN_DIR is the folder of a run that recorded its rollouts. The table has a row for each method. Its columns:

- *process turns*: mean advantage of process turns. It is near 0 if the method compares turns only with similar turns.
- *all right*, *all wrong*, *all ill-formed*: mean advantage of the final turns in groups whose rollouts all earned
  the same reward, 1, 0 or -1. It is 0 if the method centres outcomes in their group.
- *narrow*: share of the sum of |normalised gain| that comes from turn groups whose gains have a standard deviation
  below 0.01. Only methods with turn groups have a value here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from a2tgpo.io.errors import require
from a2tgpo.io.program import exit_code, program_parser

STEPS = 16
"""Largest number of steps to read from each run, spread over the run."""


def main(argv: Sequence[str] | None = None) -> int:
    return exit_code(lambda: show(argv))


def show(argv: Sequence[str] | None) -> None:
    """Read the command line, and print the table."""
    parser = program_parser(__doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN_DIR", help="folder of a run with recorded rollouts"
    )
    args = parser.parse_args(argv)
    from advantage_facts import facts_text
    from turn_signals import read_step, recorded_steps, spread_out

    steps = []
    for run in args.runs:
        recorded = list(recorded_steps(run))
        require(bool(recorded), "RUN_DIR", str(run), "the folder of a run with recorded rollouts")
        steps += [read_step(run, step) for step in spread_out(recorded, STEPS)]
    print(facts_text(steps))


if __name__ == "__main__":
    sys.exit(main())
