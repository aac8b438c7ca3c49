"""Start ranks under mpirun: they agree over MPI on an address, then each rank executes launch/train.py.

    mpirun -n RANKS python launch/mpi.py --config CONFIG [--dry-run] [--resume auto|PATH|none] [OVERRIDE ...]
    srun --mpi=pmix ... python launch/mpi.py --config CONFIG ...
    mpirun -n RANKS python launch/mpi.py --script launch/warmstart.py --config CONFIG [OVERRIDE ...]

If MASTER_ADDR and MASTER_PORT are not set, rank 0 chooses the address and the port. After the ranks have agreed, this
program finalises MPI and replaces itself by the training program (exec). So MPI's handlers, memory hooks and threads
no longer exist when vLLM and NCCL start. If a rank's exit code is not 0, mpirun ends the other ranks.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from a2tgpo.config.expand import text_argument
from a2tgpo.io.errors import ConfigError
from a2tgpo.launch.mpi import meet
from a2tgpo.launch.rendezvous import forget_torchrun
from a2tgpo.lifecycle.failure import report_failure

TRAIN = Path(__file__).with_name("train.py")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage="mpi.py [--script FILE] --config CONFIG [OPTION ...] [OVERRIDE ...]",
        epilog="All but --script goes to the script.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--script",
        type=text_argument,
        default=str(TRAIN),
        help="what each rank runs (default: launch/train.py)",
    )
    args, arguments = parser.parse_known_args()
    try:
        if not Path(args.script).is_file():
            raise ConfigError(f"--script is {args.script!r}; allowed: a Python file")
        found = meet()
    except (ConfigError, RuntimeError) as error:
        return report_failure(error)
    forget_torchrun(os.environ)
    os.environ.update(found)
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    os.execv(sys.executable, [sys.executable, args.script, *arguments])


if __name__ == "__main__":
    sys.exit(main())
