"""What can be known of a model before an engine is built on it, and refusals in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from a2tgpo.config.check import require


def read_model(model_path: str) -> tuple[Any, int]:
    """The model's configuration and the number of ids its tokenizer knows."""
    from transformers import AutoConfig, AutoTokenizer

    folder = Path(model_path)
    for pattern in ("config.json", "*.safetensors", "tokenizer.json"):
        require(
            any(folder.glob(pattern)),
            "model.path",
            model_path,
            f"a folder with config.json, *.safetensors and tokenizer.json; {pattern} is not there",
        )
    return AutoConfig.from_pretrained(folder), len(AutoTokenizer.from_pretrained(folder))


def cache_bytes_of_one(hf_config: Any, max_model_len: int, block: int, dtype: str, tp_size: int) -> int:
    """KV cache bytes of one sequence of `max_model_len` tokens on one rank."""
    heads = getattr(hf_config, "num_key_value_heads", None) or hf_config.num_attention_heads
    head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    # One block more: vLLM keeps an empty one for itself.
    num_tokens = (-(-max_model_len // block) + 1) * block
    element_bytes = 4 if dtype == "float32" else 2
    return 2 * hf_config.num_hidden_layers * max(1, heads // tp_size) * head_dim * num_tokens * element_bytes


def explain_refusal(error: ValueError, max_model_len: int) -> str:
    """vLLM's refusal in one line that names our settings."""
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
    return f"the engine refuses the model or its settings: {text:.300}"
