"""Run programs of tests/distributed on several real processes, as torchrun does."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from preloaded.command import PYTHON

DISTRIBUTED = Path(__file__).with_name("distributed")
OF_A_LAUNCHER = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
"""Variables that an earlier test in this process may have set."""


def run_ranks(
    num_ranks: int,
    worker: str,
    *arguments: object,
    environment: dict[str, str] | None = None,
    timeout_s: float = 900,
) -> str:
    """Run `worker`, a file of tests/distributed, on each rank, and return the output of the ranks.

    Raises:
        AssertionError: unless all ranks end with exit code 0 in time.
    """
    variables = {k: v for k, v in os.environ.items() if k not in OF_A_LAUNCHER} | (environment or {})
    variables["PYTHONPATH"] = os.pathsep.join([str(DISTRIBUTED), variables["PYTHONPATH"]])
    torchrun = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    process = subprocess.Popen(
        [*torchrun, str(DISTRIBUTED / worker), *map(str, arguments)],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher ends its ranks
        output, _ = process.communicate()
        raise AssertionError(f"still running after {timeout_s} s:\n{output[-4000:]}") from None
    assert process.returncode == 0, output[-6000:]
    return output
