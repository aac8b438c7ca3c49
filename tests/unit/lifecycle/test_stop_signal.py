"""If a signal arrives before training, the process ends at once, and rank 0 says what is saved."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys
from a2tgpo.lifecycle.stop_signal import StopSignal
stop = StopSignal()
stop.kept = sys.argv[1]
os.kill(os.getpid(), signal.{name})
"""


@pytest.mark.parametrize(
    ("name", "rank", "kept", "said"),
    [
        ("SIGTERM", "0", "", "stopped before there was anything new to save: SIGTERM\n"),
        (
            "SIGUSR1",
            "0",
            "7 answers of earlier starts are kept in x.partial",
            "stopped before there was anything new to save: SIGUSR1; 7 answers of earlier starts are kept in "
            "x.partial\n",
        ),
        ("SIGTERM", "1", "7 answers", ""),
    ],
)
def test_a_signal_at_the_start_says_what_is_kept_once_and_ends_with_75(name, rank, kept, said):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(name=name), kept],
        env=os.environ | {"RANK": rank},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (75, said)
