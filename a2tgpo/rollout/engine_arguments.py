"""Convert the section `rollout` to vLLM's EngineArgs, for a GPU or a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from a2tgpo.config.rollout import GPU_STEP_TOKENS, RolloutConfig
from a2tgpo.io.errors import require
from a2tgpo.rollout.engine_limits import cache_bytes_of_one, quantization_name

LOAD_FORMAT = "a2tgpo"
"""Name of the loader in `vllm_engine.py`, which reads the same files as the trainer."""
ON_GPU = torch.cuda.is_available()


def engine_arguments(
    model_path: str, hf_config: Any, config: RolloutConfig, *, dtype: str, max_model_len: int, seed: int
) -> dict[str, Any]:
    """Return the keyword arguments for vLLM's EngineArgs.

    Raises:
        ConfigError: with a one-line message, if a CPU engine does not support the block size, the cache size or
            asynchronous scheduling, or if the model or the machine does not support the quantisation.
    """
    cache_bytes = int(config.kv_cache_gib * 2**30)
    arguments: dict[str, Any] = dict(
        model=model_path,
        # With "auto", vLLM would prefer files in Mistral's format if the folder contains any.
        config_format="hf",
        load_format=LOAD_FORMAT,
        skip_tokenizer_init=True,  # `vllm_engine.py` passes the trainer's tokenizer
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=config.max_concurrent,
        tensor_parallel_size=config.tensor_parallel,
        block_size=config.block_size or (16 if ON_GPU else 32),
        enable_prefix_caching=True,
        seed=seed,
        disable_log_stats=True,
        # Apply temperature and masks to the log-probs of sampled tokens. The setting does not change the log-probs of
        # a request's prompt.
        logprobs_mode="processed_logprobs",
        use_tqdm_on_load=False,
    )
    if dist.is_initialized() and dist.get_world_size() > 1:
        arguments["distributed_executor_backend"] = "external_launcher"
    if config.router_replay:
        arguments["enable_return_routed_experts"] = True
    if config.quantization != "none":
        arguments["quantization"] = quantization_name(config, dtype, hf_config)
    if ON_GPU:
        assert config.gpu_memory_fraction, "settle the engine's share of the GPU first (engine_share.py)"
        arguments |= dict(
            enable_sleep_mode=True,
            enforce_eager=config.enforce_eager,
            async_scheduling=config.async_scheduling,  # must be set, because vLLM's default on GPUs is True
            gpu_memory_utilization=config.gpu_memory_fraction,
            max_num_batched_tokens=max(GPU_STEP_TOKENS, config.max_concurrent),
        )
        if cache_bytes:
            arguments["kv_cache_memory_bytes"] = cache_bytes
        return arguments
    require(
        not config.async_scheduling,
        "rollout.async_scheduling",
        config.async_scheduling,
        "false without a visible GPU; vLLM schedules synchronously on CPUs",
    )
    block = arguments["block_size"]
    require(block % 32 == 0, "rollout.block_size", block, "a multiple of 32 without a visible GPU")
    needed = cache_bytes_of_one(hf_config, max_model_len, block, dtype, config.tensor_parallel)
    require(
        cache_bytes >= needed,
        "rollout.kv_cache_gib",
        config.kv_cache_gib,
        f">= {needed / 2**30 + 0.0005:.3f}, enough for one sequence of {max_model_len} tokens",
    )
    # On a CPU, prompts are prefilled whole. After a part of a prompt, vLLM would reset the offset of the request's
    # random generator, but CPU generators have no offset.
    return arguments | dict(
        enforce_eager=True,
        kv_cache_memory_bytes=cache_bytes,
        enable_chunked_prefill=False,
        max_num_batched_tokens=max(max_model_len, 4096, config.max_concurrent),
    )
