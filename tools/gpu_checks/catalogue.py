"""All checks by name. The checks run in the order of this list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gpu_checks.attention import check_context_parallel, check_packed_attention
from gpu_checks.bench import Bench
from gpu_checks.engine import check_engine_memory, check_engine_speed
from gpu_checks.fp8 import check_fp8, check_slice
from gpu_checks.memory import check_memory
from gpu_checks.network import check_all_reduce
from gpu_checks.resume import check_resume
from gpu_checks.step import (
    check_fp8_rollout_step,
    check_fp8_step,
    check_fp8_trainer_step,
    check_training_step,
)


@dataclass(frozen=True, kw_only=True)
class Check:
    run: Callable[[Bench], None]
    alone: bool = False
    """Whether the check runs on one rank only."""
    needs_gpu: str = ""
    """Why the check is skipped on a machine without a GPU. Empty if the check also runs on a CPU."""
    timeout_s: float = 600.0
    """Default of --timeout-s, long enough for a first run, which compiles kernels."""


COLD_ENGINE_S = 1200.0
"""Time limit of checks that build engines. With one thread and an empty cache, torch.compile takes minutes."""
_FP8 = "FP8 is computed by Transformer Engine and vLLM on cards from compute capability 8.9 on"

CHECKS: dict[str, Check] = {
    "all_reduce": Check(run=check_all_reduce),
    "packed_attention": Check(run=check_packed_attention, alone=True),
    "context_parallel": Check(run=check_context_parallel),
    "fp8": Check(run=check_fp8, alone=True, needs_gpu=_FP8),
    "slice": Check(run=check_slice, alone=True),
    "memory": Check(run=check_memory, alone=True),
    "engine_memory": Check(
        run=check_engine_memory,
        alone=True,
        needs_gpu="an engine on a CPU has no memory to give back",
        timeout_s=COLD_ENGINE_S,
    ),
    "engine_speed": Check(run=check_engine_speed, alone=True, timeout_s=COLD_ENGINE_S),
    "training_step": Check(run=check_training_step, timeout_s=COLD_ENGINE_S),
    "resume": Check(run=check_resume, alone=True, timeout_s=COLD_ENGINE_S),
    "fp8_rollout_step": Check(run=check_fp8_rollout_step, needs_gpu=_FP8, timeout_s=COLD_ENGINE_S),
    "fp8_trainer_step": Check(run=check_fp8_trainer_step, needs_gpu=_FP8, timeout_s=COLD_ENGINE_S),
    "fp8_step": Check(run=check_fp8_step, needs_gpu=_FP8, timeout_s=COLD_ENGINE_S),
}
