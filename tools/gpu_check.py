"""Check that this machine or cluster computes correctly; run this program before the first training run.

    python tools/gpu_check.py [--json FILE]                      all GPUs of this machine, or its CPUs
    torchrun --nnodes 2 --nproc-per-node 8 ... tools/gpu_check.py                      several machines
    srun --ntasks-per-node 8 python tools/gpu_check.py       the same, with MASTER_ADDR and MASTER_PORT

Each check runs in its own processes, so a check that fails or hangs does not stop the other checks. The file of
--json is rewritten after every check. On a machine without a GPU, the checks that need a GPU are skipped. The exit
code is 0 if no row failed, 1 if a row failed, and 2 if the arguments are wrong. docs/cluster_check.md lists the
checks and their limits.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from a2tgpo.config.expand import path_argument
from a2tgpo.io.atomic_file import write_json
from a2tgpo.io.errors import ConfigError
from a2tgpo.io.program import program_parser

from gpu_checks.bench import Bench, Row, Settings, as_json, table, verdict
from gpu_checks.catalogue import CHECKS
from gpu_checks.launch import RankSync, launched_environment, rank_environments
from gpu_checks.machine import describe_machine, gpus_row, machine_text
from gpu_checks.models import slice_dimensions
from gpu_checks.run import run_check


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if args.one:
        return run_one(args)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    machine = describe_machine()
    ranks = RankSync(args.launched, timeout_s=max(args.limits.values()))
    is_first = ranks.rank == 0
    rows = [gpus_row(machine)] if machine["gpus"] else []
    if is_first:
        print("\n".join((machine_text(machine), *([table(rows)] if rows else []))), flush=True)
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        for name in args.checks:
            start = time.monotonic()
            found = ranks.share(name, run_named(name, args, machine, Path(folder)))
            seconds[name] = round(time.monotonic() - start, 1)
            rows += found
            if is_first:
                print(f"{table(found)}\n# {name} took {seconds[name]:.0f} s", flush=True)
                if args.json:
                    write_results(args, machine, seconds, rows)
            if args.keep_logs:
                keep_logs(Path(folder) / name, args.keep_logs)
    if is_first:
        print(verdict(rows))
    return ranks.agree(1 if any(row.status == "FAIL" for row in rows) else 0)


def run_named(name: str, args: argparse.Namespace, machine: dict[str, Any], folder: Path) -> list[Row]:
    """Run the check `name` with the ranks that this process starts, and return the rows of these ranks."""
    check = CHECKS[name]
    if check.needs_gpu and not machine["gpus_seen_by_torch"]:
        is_first = args.launched is None or args.launched["RANK"] == "0"
        note = f"needs a GPU: {check.needs_gpu}"
        return [Row(check=name, name=name, status="SKIP", note=note)] if is_first else []
    environments = rank_environments(
        args.launched,
        num_ranks=args.ranks or machine["gpus_seen_by_torch"] or 2,
        alone=check.alone,
        index=list(CHECKS).index(name),
    )
    work = folder / name
    work.mkdir()
    logging = {"VLLM_LOGGING_LEVEL": args.vllm_logging} if args.vllm_logging else {}
    environments = [{**environment, **logging} for environment in environments]
    return run_check(name, environments, settings=args.settings, work=work, timeout_s=args.limits[name])


def run_one(args: argparse.Namespace) -> int:
    """Run one rank of the check `args.one`, and return exit code 0. The environment has RANK and WORLD_SIZE."""
    bench = Bench(
        check=args.one,
        work=args.work,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        settings=Settings.loads(args.settings),
    )
    CHECKS[args.one].run(bench)
    return 0


def write_results(
    args: argparse.Namespace, machine: dict[str, Any], seconds: dict[str, float], rows: list[Row]
) -> None:
    """Write all results so far to `args.json`. The key `unfinished` lists the checks that have not ended."""
    content = {
        "machine": machine,
        "settings": args.settings.as_json(),
        "unfinished": [name for name in args.checks if name not in seconds],
        "seconds": seconds,
        "checks": as_json(rows),
    }
    write_json(args.json, content)


def keep_logs(work: Path, out: Path) -> None:
    for log in work.glob("*.log"):
        (out / log.name).write_bytes(log.read_bytes())


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.one:
        return args
    try:
        args.checks = _checks(args.checks)
        args.limits = _limits(args.timeout_s)
        args.settings = _settings(args)
        args.launched = launched_environment()
    except ValueError as error:  # ConfigError is a ValueError
        parser.error(str(error))
    if args.ranks < 0:
        parser.error("--ranks must be positive")
    if args.vllm_logging and not args.keep_logs:
        parser.error("--vllm-logging needs --keep-logs FOLDER, which receives the messages")
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json: there is no folder {args.json.absolute().parent}")
    if args.keep_logs:
        try:
            args.keep_logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--keep-logs: cannot create {args.keep_logs} ({error.strerror})")
    return args


def build_parser() -> argparse.ArgumentParser:
    parser = program_parser(__doc__)
    longest = max(check.timeout_s for check in CHECKS.values())
    parser.add_argument("--checks", help=f"some of {','.join(CHECKS)}")
    parser.add_argument(
        "--ranks", type=int, default=0, help="processes; default: one per GPU, 2 without a GPU"
    )
    parser.add_argument(
        "--timeout-s",
        action="append",
        default=[],
        metavar="SECONDS | NAME=SECONDS",
        help=f"longest time of every check or of one, may be repeated; default: by check, up to {longest:g}, which "
        "a first run with nothing compiled needs",
    )
    parser.add_argument(
        "--lengths", metavar="N,N,...", help="tokens of the packed sequences with heads of 128"
    )
    parser.add_argument(
        "--like",
        metavar="MODEL",
        help="the slice's model: a folder with config.json, no weights, or a name of tools/plan.py --model "
        "(default qwen2.5-72b; a small stand-in without a GPU)",
    )
    parser.add_argument("--tensor", type=int, default=8, help="tensor-parallel size of the slice")
    parser.add_argument("--layers", type=int, default=4, help="layers of the slice")
    parser.add_argument("--min-bus-gb-s", type=float, help="minimum bus bandwidth of the largest all-reduce")
    parser.add_argument(
        "--json", type=path_argument, help="write machine and results to this file, check by check"
    )
    parser.add_argument("--keep-logs", type=path_argument, help="copy the processes' output to this folder")
    parser.add_argument(
        "--vllm-logging",
        choices=("INFO", "DEBUG"),
        help="log the engines' choices (model runner, attention, all-reduce) to --keep-logs",
    )
    parser.add_argument("--one", choices=CHECKS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=path_argument, help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    return parser


def _checks(text: str | None) -> list[str]:
    """Return the names of the selected checks in the order of `CHECKS`. Without --checks, select all checks."""
    wanted = list(CHECKS) if text is None else text.split(",")
    for name in wanted:
        if name not in CHECKS:
            raise ConfigError(f"--checks names {name!r}; allowed: {','.join(CHECKS)}")
    return [name for name in CHECKS if name in wanted]


def _limits(given: list[str]) -> dict[str, float]:
    """Return {check: limit in seconds}. A value of --timeout-s is NAME=SECONDS, or SECONDS for all other checks."""
    limits = {name: check.timeout_s for name, check in CHECKS.items()}
    for text in sorted(",".join(given).split(",") if given else [], key=lambda text: "=" in text):
        name, equals, number = text.rpartition("=")
        if equals and name not in CHECKS:
            raise ConfigError(f"--timeout-s names {name!r}; allowed: {','.join(CHECKS)}")
        try:
            seconds = float(number)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            raise ConfigError(
                f"--timeout-s is {text!r}; allowed: positive seconds, or a check's name and =seconds"
            )
        limits |= {name: seconds} if equals else dict.fromkeys(limits, seconds)
    return limits


def _settings(args: argparse.Namespace) -> Settings:
    if args.min_bus_gb_s is not None and not 0 <= args.min_bus_gb_s < math.inf:
        raise ConfigError(f"--min-bus-gb-s is {args.min_bus_gb_s}; allowed: 0 or more")
    if args.tensor < 1:
        raise ConfigError(f"--tensor is {args.tensor}; allowed: 1 or more")
    # Validate the slice's shapes before any check starts, so that a mistake gives one error line.
    slice_dimensions(args.like, tensor=args.tensor, layers=args.layers, on_gpu=True)
    lengths = None if args.lengths is None else _lengths(args.lengths)
    return Settings(
        min_bus_gb_s=args.min_bus_gb_s,
        lengths=lengths,
        like=args.like,
        tensor=args.tensor,
        layers=args.layers,
    )


def _lengths(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if not all(number.isdecimal() and 1 <= int(number) <= 2**20 for number in numbers):
        raise ConfigError(f"--lengths is {text!r}; allowed: integers from 1 to 1048576, separated by commas")
    return tuple(map(int, numbers))


if __name__ == "__main__":
    sys.exit(main())
