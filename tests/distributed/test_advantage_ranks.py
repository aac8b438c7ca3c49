"""Every method's advantages over four gloo processes, for random spreads (advantage_worker says what is checked)."""

import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("advantage_worker.py")
NUM_RANKS = 4


@pytest.mark.distributed
def test_advantages_do_not_depend_on_which_rank_holds_a_rollout():
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(NUM_RANKS), str(WORKER)),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "ALL CHECKS PASSED" in result.stdout
