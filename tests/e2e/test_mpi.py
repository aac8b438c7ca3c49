"""A run under mpirun equals a run under torchrun, and a rank that fails ends all ranks."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from faults.harness import metrics_of, rollouts_of, write_inputs
from preloaded.command import PYTHON

ROOT = Path(__file__).resolve().parents[2]

MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "launch/mpi.py"]
SMALL = ["run.steps=1", "evaluation.every=0", "checkpoint.every=0"]

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun: the Debian package openmpi-bin"),
]


def start(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHON": PYTHON, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_run_under_mpirun_equals_that_under_torchrun_bit_for_bit(tmp_path):
    config = str(write_inputs(tmp_path))
    torchrun = start(["launch/local.sh", "-n", "2", config, "run.name=torchrun", *SMALL])
    assert torchrun.returncode == 0, torchrun.stderr[-3000:]
    mpirun = start([*MPIRUN, "--config", config, "run.name=mpirun", *SMALL])
    assert mpirun.returncode == 0, mpirun.stderr[-3000:]
    assert "on 2 ranks" in mpirun.stderr
    metrics = metrics_of(tmp_path / "mpirun")
    assert metrics.keys() == {1} and metrics[1]["update/grad_norm"] > 0
    assert metrics == metrics_of(tmp_path / "torchrun")
    assert rollouts_of(tmp_path / "mpirun") == rollouts_of(tmp_path / "torchrun")


def test_a_rank_that_fails_ends_the_others_with_its_exit_code(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os, sys, time\nsys.exit(3) if os.environ['RANK'] == '1' else time.sleep(900)\n")
    assert start([*MPIRUN, "--script", str(script)]).returncode == 3


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MPI4PY_LIBMPI": "/nowhere/libmpi.so"}, "found no MPI library: .* install the package openmpi-bin"),
        ({"PMI_SIZE": "4"}, "started 4 processes, but each sees only itself through Open MPI"),
    ],
    ids=["no library", "another MPI's mpirun"],
)
def test_an_mpi_that_does_not_work_is_one_line(environment, message):
    ended = start(MPIRUN[-2:], **environment)
    assert ended.returncode == 3
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ") and re.search(message, line), line
