"""Check model and machine before an engine is built, and rewrite vLLM's refusals as one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from a2tgpo.batch.expert_rows import ExpertShape
from a2tgpo.config.fp8 import ENGINE_CAPABILITY, LinearSizes, quantization_fault
from a2tgpo.config.rollout import RolloutConfig
from a2tgpo.data.tokenizer import load_tokenizer
from a2tgpo.io.errors import ConfigError, require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUANTIZATION_NAMES = {"fp8": "fp8_per_block", "fp8_per_channel": "fp8_per_channel"}
"""Maps `rollout.quantization` to vLLM's name for the method. At the first load and at every refit, each method
quantises full-precision weights layer by layer (vllm/model_executor/model_loader/reload/layerwise.py).
"""


def read_model(
    model_path: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Return the configuration and the tokenizer of the model in folder `model_path`.

    Args:
        tokenizer: the model's tokenizer, or None to load it.

    Raises:
        ConfigError: with a one-line message, if the folder or its config.json is missing, or if
            `load_tokenizer` raises this error.
    """
    from transformers import AutoConfig

    require(
        (Path(model_path) / "config.json").is_file(),
        "model.path",
        model_path,
        "a folder with config.json, *.safetensors and tokenizer.json; config.json is missing",
    )
    return AutoConfig.from_pretrained(model_path), tokenizer or load_tokenizer(model_path)


def cache_bytes_of_one(hf_config: Any, max_model_len: int, block: int, dtype: str, tp_size: int) -> int:
    """Return the bytes of KV cache that one sequence of `max_model_len` tokens takes on one rank."""
    heads = getattr(hf_config, "num_key_value_heads", None) or hf_config.num_attention_heads
    head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    # vLLM reserves one additional block per sequence.
    num_tokens = (-(-max_model_len // block) + 1) * block
    element_bytes = 4 if dtype == "float32" else 2
    return 2 * hf_config.num_hidden_layers * max(1, heads // tp_size) * head_dim * num_tokens * element_bytes


def quantization_name(config: RolloutConfig, dtype: str, hf_config: Any) -> str:
    """Return vLLM's name for the method that `rollout.quantization` selects.

    Raises:
        ConfigError: if the machine, the weights' `dtype` or the model's sizes do not allow this method.
    """
    key, value = "rollout.quantization", config.quantization
    require(
        torch.cuda.is_available(), key, value, "none without a visible GPU; vLLM has no FP8 layers for CPUs"
    )
    require(
        torch.cuda.get_device_capability() >= ENGINE_CAPABILITY,
        key,
        value,
        "none on cards before compute capability 8.9",
    )
    require(dtype == "bfloat16", key, value, f"none with weights in {dtype}; FP8 needs bfloat16 around it")
    if fault := quantization_fault(value, config.tensor_parallel, LinearSizes.of(hf_config)):
        raise ConfigError(fault)
    return QUANTIZATION_NAMES[value]


def check_router_replay(hf_config: Any) -> ExpertShape:
    """Return the shape of the rows of experts that an engine returns for `rollout.router_replay`.

    Raises:
        ConfigError: if the model has no experts, or if engines on this machine do not return experts.
    """
    shape = ExpertShape.of(hf_config)
    # Model runner V2 needs Triton, so a CPU engine uses it only if VLLM_USE_V2_MODEL_RUNNER is 1.
    has_second_runner = torch.cuda.is_available() or os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
    if not has_second_runner:
        raise ConfigError(
            "rollout.router_replay is true; allowed: false without a visible GPU, since vLLM's model runner for CPUs "
            "does not return experts"
        )
    return shape


def explain_refusal(error: ValueError, max_model_len: int) -> str:
    """Return a one-line explanation of vLLM's refusal in terms of this project's settings."""
    text = " ".join(str(error).split())
    if "KV cache" in text:
        return (
            f"the engine's KV cache does not hold one sequence of {max_model_len} tokens; raise "
            f"rollout.kv_cache_gib or rollout.gpu_memory_fraction, or lower rollout.max_response_tokens ({text:.200})"
        )
    if "max_model_len" in text:
        return (
            f"data.max_prompt_tokens + rollout.max_response_tokens is {max_model_len}, more than the model's "
            f"positions; lower one of them ({text:.200})"
        )
    if "AuxOutput" in text or "routed-experts" in text.lower():
        return (
            "rollout.router_replay is true; allowed: false, since the engine cannot return the experts it chooses "
            f"({text:.200})"
        )
    return f"the engine refuses the model or its settings: {text:.300}"
