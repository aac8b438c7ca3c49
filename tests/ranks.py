"""Run programs of tests/distributed on several real processes, as torchrun does.

    python ranks.py NUM_RANKS WORKER [ARGUMENT ...]

The ranks are forks of a process that has imported the worker's modules, which saves most of a short launch's time.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

from a2tgpo.lifecycle.garbage import lasting_objects

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
    process = subprocess.Popen(
        [sys.executable, __file__, str(num_ranks), str(DISTRIBUTED / worker), *map(str, arguments)],
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


def main(num_ranks: str, worker: str, *arguments: str) -> None:
    with lasting_objects():
        runpy.run_path(worker)  # only imports the modules, because the name is not __main__
        from torch.distributed.run import main as torchrun

    sys.stdout.flush()  # otherwise each fork prints the content of the buffer
    fork = ["--start-method", "fork", "--run-path", worker]
    torchrun(["--standalone", "--nproc-per-node", num_ranks, *fork, *arguments])


if __name__ == "__main__":
    main(*sys.argv[1:])
