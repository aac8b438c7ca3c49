"""torchrun on one machine, without its traceback: the failing rank has said what was wrong in a line of its own.

    python launch/local_ranks.py NUM_RANKS SCRIPT [ARGUMENT ...]

Exits with the code of the rank that failed first; the others are ended by torchrun.
"""

import logging
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def run(num_ranks: str, script: str, *arguments: str) -> int:
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        main(["--standalone", "--nproc-per-node", num_ranks, script, *arguments])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0 or failure.exitcode > 3:
            print(f"launch: rank {rank} ended with {failure.exitcode}: {failure.message}", file=sys.stderr)
        return abs(failure.exitcode) or 1
    return 0


if __name__ == "__main__":
    sys.exit(run(*sys.argv[1:]))
