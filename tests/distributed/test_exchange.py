"""Exchange and group statistics over real gloo processes (see exchange_worker for what is checked)."""

import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("exchange_worker.py")


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "tensor", "pipeline"), [(4, 1, 1), (4, 2, 1)])
def test_exchange_and_advantages_do_not_depend_on_the_spread(ranks, tensor, pipeline):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    result = subprocess.run(
        [*command, str(WORKER), str(tensor), str(pipeline)], capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "ALL CHECKS PASSED" in result.stdout
