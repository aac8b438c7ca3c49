"""Transformer Engine's own Python code, forward and backward, with a PyTorch reference for its compiled part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from te_reference import ENVIRONMENT, FOLDER

CHECKS_OF = {
    "dp2": [
        "float32_is_the_twin",
        "float32_is_the_twin_with_tied_embeddings",
        "bfloat16_is_as_exact_as_the_twin",
        "fp8_weights_are_quantised_once_a_pass_and_anew_after_updates",
        "recomputation_changes_no_bit",
        "weight_gradients_add_up_in_float32",
        "added_gradients_are_nearer_to_float32",
        "added_gradients_are_the_same_in_float32",
        "added_gradients_are_reduced_beside_the_computation",
        "fused_adam_is_the_cpus",
        "a_loaded_checkpoint_goes_on_to_the_bit",
        "fault_a_row_that_fp8_cannot_take",
        "fault_segments_of_64_bits",
        "fault_wrong_segments",
        "fault_weights_of_before_the_update",
    ],
    "tp2": ["float32_is_the_twin"],
    "tp2_sequence": [
        "float32_is_the_twin",
        "float32_is_the_twin_with_biases",
        "float32_is_the_twin_with_experts",
        "float32_is_the_twin_with_adapters",
        "fp8_is_near_bfloat16",
        "fp8_blockwise_does_not_depend_on_tensor_parallelism",
        "fp8_tensorwise_depends_on_tensor_parallelism",
    ],
    "pp2": ["float32_is_the_twin_with_tied_embeddings", "added_gradients_are_the_same_in_float32"],
    "cp2": ["bfloat16_is_as_exact_as_the_twin"],
    "ep2": [
        "float32_is_the_twin_with_experts",
        "fp8_is_near_bfloat16_with_experts",
        "added_gradients_are_the_same_in_float32",
    ],
}
CHECKS = [f"{check}[{layout}]" for layout, checks in CHECKS_OF.items() for check in checks]

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        not FOLDER.is_dir(), reason="Transformer Engine's wheels are in the second leg (make test-py312)"
    ),
]


def run_worker(script: str, *arguments: str) -> None:
    """Run a program of this folder on two ranks until it ends."""
    paths = os.pathsep.join([os.environ["PYTHONPATH"], str(FOLDER)])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.run(
        [*command, str(Path(__file__).with_name(script)), *arguments],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-6000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("engine")
    run_worker("te_worker.py", str(folder))
    found: dict[str, str] = json.loads((folder / "results.json").read_text())
    return found


@pytest.mark.parametrize("check", CHECKS)
def test_transformer_engine(results: dict[str, str], check: str) -> None:
    """Each check states its claim in te_checks.py or te_training_checks.py."""
    assert results[check] == ""


def test_every_check_of_the_worker_is_looked_at(results: dict[str, str]) -> None:
    assert sorted(results) == sorted(CHECKS)
