"""Scoring, training and checkpoints over real gloo processes (see update_worker.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS_OF = {
    "gradients": "dp4 tp2 tp2_sequence pp2_vpp2 pp2 pp2_uneven cp2 tp2_cp2_sequence cp2_pp2_vpp2 tp2_pp2",
    "output_rows": "dp4 tp2 tp2_sequence pp2 cp2 tp2_cp2_sequence cp2_pp2_vpp2",
    "turn_ratios": "pp2_vpp2 cp2 tp2_cp2_sequence cp2_pp2_vpp2 tp2_pp2",
    "probes": "dp4 tp2_sequence pp2_vpp2",
    "scores": "dp4 tp2_sequence pp2_vpp2 pp2 pp2_uneven cp2 tp2_cp2_sequence tp2_pp2",
    "update": "pp2_vpp2 pp2_uneven cp2 tp2_cp2_sequence cp2_pp2_vpp2",
    "correction": "dp4 cp2 cp2_pp2_vpp2 tp2_pp2",
    "nan_is_skipped": "dp4 pp2_vpp2 pp2 cp2 tp2_pp2",
    "resume": "dp4 pp2_vpp2 cp2 tp2_pp2",
    "another_layout": "pp2_vpp2 pp2 tp2_cp2_sequence tp2_pp2",
    "values_of_another_layout": "pp2_vpp2 tp2_cp2_sequence tp2_pp2",
    "earlier_format": "dp4",
    "earlier_format_of_another_layout": "tp2_pp2",
    "resume_with_buckets": "dp4",
    "resume_bfloat16": "dp4",
    "resume_whole_optimizer": "dp4",
    "host_memory": "dp4",
    "memory_phases": "pp2_vpp2",
    "memory_phases_with_buckets": "dp4",
    "data_parallel_updates": "dp4",
    "retention": "dp4",
    "one_best": "dp4",
}
CHECKS = [f"{check}[{layout}]" for check, layouts in LAYOUTS_OF.items() for layout in layouts.split()]

pytestmark = pytest.mark.distributed


def start(num_ranks: int, script: Path, *arguments: str) -> subprocess.Popen:
    launcher = (
        [sys.executable]
        if num_ranks == 1
        else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    )
    outside = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    return subprocess.Popen(
        [*launcher, str(script), *arguments],
        env={key: value for key, value in os.environ.items() if key not in outside},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen, timeout_s: float) -> str:
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.terminate()
        output, _ = process.communicate()
        raise AssertionError(f"still running after {timeout_s} s:\n{output[-3000:]}") from None
    assert process.returncode == 0, output[-3000:]
    return output


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("update")
    finish(start(4, Path(__file__).with_name("update_worker.py"), str(folder)), 300)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("check", CHECKS)
def test_update(results, check) -> None:
    """Each check states its claim in update_worker.py."""
    assert results[check] == ""


def test_every_check_of_the_worker_is_looked_at(results) -> None:
    assert sorted(results) == sorted(CHECKS)
