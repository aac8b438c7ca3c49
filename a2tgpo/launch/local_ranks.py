"""Run torchrun on one machine and hide torchrun's traceback, because the failing rank has already printed its error.

    python -m a2tgpo.launch.local_ranks NUM_RANKS SCRIPT [ARGUMENT ...]

If a rank fails, torchrun ends the other ranks, and this program exits with the code of the rank that failed first.
The program passes SIGTERM and SIGUSR1 on to the ranks. After such a signal the ranks end on their own
(a2tgpo/lifecycle/stop_signal.py).
"""

import logging
import os
import signal
import sys
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from a2tgpo.io.exit_codes import BAD_CONFIG, BROKEN_RUN, START_AGAIN
from a2tgpo.launch.rendezvous import forget_torchrun
from a2tgpo.lifecycle.stop_signal import SIGNALS

OPTIONS = (
    "--standalone",
    *("--local-addr", "127.0.0.1"),  # the machine's own name may have no address
    # SIGTERM is not in this list, because torchrun would then give the ranks only half a minute to save.
    *("--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT"),
)


def pass_on(number: int, _frame: FrameType | None) -> None:
    ranks = psutil.Process().children()
    if not ranks:  # torchrun has not started any rank yet
        os._exit(START_AGAIN)
    for rank in ranks:
        rank.send_signal(number)


def run(num_ranks: str, script: str, *arguments: str) -> int:
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    forget_torchrun(os.environ)
    for number in SIGNALS:
        signal.signal(number, pass_on)
    try:
        main([*OPTIONS, "--nproc-per-node", num_ranks, script, *arguments])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if not 0 <= failure.exitcode <= BROKEN_RUN and failure.exitcode != START_AGAIN:
            print(f"launch: rank {rank} ended with {failure.exitcode}: {failure.message}", file=sys.stderr)
        return abs(failure.exitcode) or 1
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 3 or not sys.argv[1].isdecimal() or int(sys.argv[1]) < 1:
        print("usage: local_ranks.py NUM_RANKS SCRIPT [ARGUMENT ...], NUM_RANKS >= 1", file=sys.stderr)
        sys.exit(BAD_CONFIG)
    sys.exit(run(*sys.argv[1:]))
