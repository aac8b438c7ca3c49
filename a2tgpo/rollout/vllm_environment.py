"""Set the environment variables that vLLM reads when it is imported."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from a2tgpo.rollout.engine_arguments import ON_GPU


def prepare_environment() -> None:
    """Set the variables. Call this before the first import of vllm."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process, to pass weights by reference
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["DO_NOT_TRACK"] = "1"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_CACHE_ROOT", str(_cache_root()))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if not ON_GPU:
        # Otherwise the first log-probs would start a C++ compilation of 25 s, even in eager mode. Set both the
        # variable and the option, because torch._dynamo reads the variable only when it is imported.
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
        import torch._dynamo

        torch._dynamo.config.disable = True
        # Triton is usually missing on a CPU, so do not log its absence.
        logging.getLogger("torch._library.triton").setLevel(logging.ERROR)


def name_engine_ranges(tool: str) -> None:
    """Let vLLM name the parts of its engine steps in profiles of `tool`, which is `torch` or `nsys`.

    Call this before the engine is built.
    """
    ranges = "CUSTOM" if tool == "torch" else "NVTX"
    os.environ[f"VLLM_{ranges}_SCOPES_FOR_PROFILING"] = "1"


def _cache_root() -> Path:
    """Return the folder of vLLM's caches, for example of compiled kernels."""
    checkout = Path(__file__).resolve().parents[2]
    return (checkout if (checkout / "setup.py").exists() else Path.home()) / ".cache" / "a2tgpo" / "vllm"
