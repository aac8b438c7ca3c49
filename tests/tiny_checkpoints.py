"""Hugging Face checkpoints small enough for a unit test, with weights large enough for errors to show."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

_CLASSES = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig),
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config),
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config),
}


def save_tiny_checkpoint(
    folder: Path, kind: str, *, tied: bool, vocab_size: int = 250, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """A random model of architecture `kind`: 4 layers, 4 heads over 2 key-value heads; returns its folder.

    The default vocabulary is no multiple of 128, so that Megatron's is padded.
    """
    model_class, config_class = _CLASSES[kind]
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        # Qwen2 has no such option; for the others, heads wider than hidden / heads.
        **({} if kind == "qwen2" else {"head_dim": 32}),
    )
    model = model_class(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * (0.2 if parameter.dim() > 1 else 0.1) + ("norm" in name))
    model.to(dtype).save_pretrained(folder)
    return folder
