"""The checks before a run, over real processes (see preflight_worker)."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from faults.harness import write_inputs
from preloaded.command import PYTHON

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    return str(write_inputs(tmp_path_factory.mktemp("preflight")))


LEFT_BY_ANOTHER_JOB = {
    "RANK": "0",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "another-job.invalid",
    "MASTER_PORT": "9",
    "PET_NNODES": "2",
    "PET_NODE_RANK": "1",
    "TORCHELASTIC_USE_AGENT_STORE": "False",
    "TORCHELASTIC_RUN_ID": "another",
}
"""Variables that a shell inside a torchrun job exports."""
UNKNOWN_HOST = [
    "unshare",
    "--user",
    "--map-root-user",
    "--uts",
    "bash",
    "-c",
    'hostname gpu-07.invalid; exec "$@"',
    "-",
]
"""Command that runs another command under a host name that has no address."""


def start(
    config: str, what: str, prefix: Sequence[str] = (), **environment: str
) -> subprocess.CompletedProcess:
    worker = str(Path(__file__).with_name("preflight_worker.py"))
    python = sys.executable if prefix else PYTHON  # a fork would have the session's host name
    return subprocess.run(
        [*prefix, "launch/local.sh", "-n", "2", "--script", worker, config, what],
        cwd=ROOT,
        env=os.environ | {"PYTHON": python} | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def faults(config) -> subprocess.CompletedProcess:
    """The results of several starts with one fault each, and of one start without a fault. They were launched from
    another job's shell, on a host without an address.
    """
    can_rename = subprocess.run([*UNKNOWN_HOST, "true"], capture_output=True, check=False).returncode == 0
    return start(config, "faults", UNKNOWN_HOST if can_rename else (), **LEFT_BY_ANOTHER_JOB)


def test_neither_another_jobs_variables_nor_a_host_without_address_mislead_a_launch(faults):
    assert faults.returncode == 0, faults.stderr[-3000:]
    assert all(f"rank {rank}: all checks passed" in faults.stdout for rank in range(2))


def test_each_fault_of_one_rank_is_told_once_by_rank_0_and_ends_all(faults):
    done = faults
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("all checks passed") == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("preflight:")]
    assert len(lines) == 1 and "2 ranks on 1 machine, no GPU: versions, files and" in lines[0], lines
    assert re.search(r"; \d+(\.\d+)? s$", lines[0]), lines


def test_a_first_collective_that_hangs_ends_all_ranks_with_one_line(config):
    done = start(config, "stuck")
    assert done.returncode == 3
    lines = [line for line in done.stderr.splitlines() if line.startswith(("preflight:", "error:"))]
    assert (
        len(lines) == 1 and "all 2 ranks connected, but the first all-reduce timed out after" in lines[0]
    ), lines


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
        [PYTHON, "tools/convert.py", *arguments, "parallel.start_timeout_s=3"],
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
