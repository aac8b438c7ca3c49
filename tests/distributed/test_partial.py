"""What partial rollouts and the bank agree on over real gloo processes (see partial_worker for what is checked)."""

import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("partial_worker.py")


@pytest.mark.distributed
def test_ranks_that_see_different_things_decide_alike(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*command, str(WORKER), str(tmp_path)], capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "ALL CHECKS PASSED" in result.stdout
