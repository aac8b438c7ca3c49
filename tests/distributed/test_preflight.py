"""The checks before a run, over real processes (see preflight_worker for what is checked)."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "faults"))

from harness import write_inputs

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    return str(write_inputs(tmp_path_factory.mktemp("preflight")))


def start(config: str, what: str) -> subprocess.CompletedProcess:
    worker = str(Path(__file__).with_name("preflight_worker.py"))
    return subprocess.run(
        ["launch/local.sh", "-n", "2", "--script", worker, config, what],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_each_fault_of_one_rank_is_told_once_by_rank_0_and_ends_all(config):
    done = start(config, "faults")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("all checks passed") == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("preflight:")]
    assert len(lines) == 1 and "2 ranks on 1 machine, no GPU: versions, files and" in lines[0], lines
    seconds = float(lines[0].rpartition("; ")[2].removesuffix(" s"))
    assert seconds < 60, "far more than the second it takes"


def test_a_first_collective_that_hangs_ends_all_ranks_with_one_line(config):
    begin = time.monotonic()
    done = start(config, "stuck")
    assert done.returncode == 3 and time.monotonic() - begin < 120
    lines = [line for line in done.stderr.splitlines() if line.startswith(("preflight:", "error:"))]
    assert len(lines) == 1 and "all 2 ranks are there, but their first sum did not end within" in lines[0], (
        lines
    )


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        ("0", "preflight: rank 1: not ready to join the others within 3 s"),
        ("1", "did not reach rank 0 at 127.0.0.1:"),
    ],
)
def test_a_tool_does_not_wait_for_ranks_that_were_never_started(config, tmp_path, rank, message):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    left_over = {
        "RANK": rank,
        "WORLD_SIZE": "2",
        "LOCAL_RANK": rank,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    model = str(Path(config).parent / "model")
    arguments = ["hf-to-megatron", "--in", model, "--out", str(tmp_path / "out"), "--config", config]
    done = subprocess.run(
        [sys.executable, "tools/convert.py", *arguments, "parallel.start_timeout_s=3"],
        cwd=ROOT,
        env=os.environ | left_over,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith(("preflight:", "error:"))]
    assert done.returncode == 3 and len(lines) == 1 and message in lines[0], done.stderr[-2000:]
    assert not (tmp_path / "out").exists()
