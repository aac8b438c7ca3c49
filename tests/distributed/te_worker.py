"""Run Transformer Engine's Python code on its reference extension. Both ranks of test_transformer_engine.py run this
program.

    torchrun --nproc-per-node 2 te_worker.py FOLDER

One launch runs all checks and writes FOLDER/results.json. The environment must be `te_reference.ENVIRONMENT`.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import te_reference

te_reference.install()

import te_checks
import te_training_checks
import torch.distributed as dist
from te_bench import Bench, save_models

from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.parallel.collectives import all_gather_object
from a2tgpo.parallel.initialize import initialize, shutdown

CHECKS: dict[str, list[str]] = {
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


def find(name: str) -> Callable[[Bench], None]:
    module = te_checks if hasattr(te_checks, f"check_{name}") else te_training_checks
    found: Callable[[Bench], None] = getattr(module, f"check_{name}")
    return found


def main(folder: Path, wanted: str = "") -> None:
    start, results = time.perf_counter(), {}
    rank = initialize(ParallelConfig(timeout_s=60), seed=0).rank
    if rank == 0:
        save_models(folder)
    dist.barrier()
    for layout, names in CHECKS.items():
        for name in names:
            key = f"{name}[{layout}]"
            if wanted not in key:
                continue
            try:
                find(name)(Bench(folder, layout))
                fault = ""
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                fault = f"rank {rank}: {type(error).__name__}: {error} ({last.name}, line {last.lineno})"
            assert dist.group.WORLD is not None
            results[key] = next(filter(None, all_gather_object(fault, dist.group.WORLD)), "")
            if rank == 0:
                print(f"{time.perf_counter() - start:6.1f}s {key} {results[key] or 'ok'}", flush=True)
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
