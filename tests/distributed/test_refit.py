"""Engines beside Megatron on 2 real gloo processes (see refit_worker for what is checked)."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import save_tiny, taught_folder

WORKER = Path(__file__).with_name("refit_worker.py")
NUM_RANKS = 2


def passed_ranks(mode, *arguments):
    """How many ranks say that all their checks passed, after an exit code of 0."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_RANKS}"]
    result = subprocess.run(
        [*command, str(WORKER), mode, *arguments], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout.count("ALL CHECKS PASSED")


@pytest.mark.distributed
def test_one_engine_per_rank_follows_the_trainer_at_dp2_and_tp2(tmp_path):
    """A mixture of experts with tied embeddings: the two that vLLM's CPU kernels keep packed copies of."""
    assert passed_ranks("replicas", save_tiny(tmp_path, "qwen3_moe", tied=True)) == NUM_RANKS


@pytest.mark.distributed
def test_one_engine_over_both_ranks_plays_alike_and_follows_the_trainer(tmp_path):
    assert passed_ranks("shared", taught_folder().name, str(tmp_path)) == NUM_RANKS
