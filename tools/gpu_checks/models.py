"""Write models with random weights for the checks, as Hugging Face folders."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.io.errors import ConfigError, require
from a2tgpo.plan.dimensions import ModelDimensions, layout_fault, model_dimensions

if TYPE_CHECKING:
    import torch

VOCAB_SIZE = 480
CITIES = {
    "France": "Paris",
    "Japan": "Tokyo",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Egypt": "Cairo",
    "Peru": "Lima",
}
SMALL = ModelDimensions(
    architecture="qwen3",
    hidden=256,
    layers=4,
    heads=4,
    kv_heads=2,
    head_dim=64,
    ffn=512,
    vocab=VOCAB_SIZE,
    tied=False,
)
"""A model of four layers with shapes that the kernels for large models accept."""
WIDE_HEADS = dataclasses.replace(SMALL, layers=2, heads=8, kv_heads=1, head_dim=128)
"""A model with as many heads as one of 8 tensor-parallel ranks of Qwen2.5-72B or Llama-3.1-70B has."""
STAND_IN = ModelDimensions(
    architecture="qwen2",
    hidden=256,
    layers=2,
    heads=16,
    kv_heads=8,
    head_dim=32,
    ffn=3712,
    vocab=152064,
    tied=False,
)
"""A small model for machines without a GPU. As in Qwen2.5-72B, the number of feed-forward channels on one of 8 ranks,
here 464, is not a multiple of 128.
"""
DEFAULT_LIKE = "qwen2.5-72b"


def write_model(
    folder: Path,
    dimensions: ModelDimensions = SMALL,
    *,
    max_positions: int = 1024,
    device: torch.device | str = "cpu",
) -> str:
    """Write a model of `dimensions` with random weights in bfloat16, drawn on `device`. Return its folder."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(_hf_config(dimensions, max_positions))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and norms: their initial values would hide errors
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:  # twice transformers' std at 256 channels, because nearly uniform logits would hide errors
                parameter.normal_(0, 0.64 * parameter.shape[-1] ** -0.5)
    model.bfloat16().save_pretrained(folder)
    return str(folder)


def write_checkpoint(folder: Path, dimensions: ModelDimensions = SMALL, *, max_positions: int = 1024) -> str:
    """Write a model with random weights, and a tokenizer for the engine. Return the folder."""
    from worlds.tiny_model import build_tokenizer

    texts = [f"what is the capital of {country}? {city}" for country, city in CITIES.items()] * 4
    tokenizer = build_tokenizer(iter(texts))
    vocab = max(len(tokenizer), dimensions.vocab)
    write_model(folder, dataclasses.replace(dimensions, vocab=vocab), max_positions=max_positions)
    tokenizer.save_pretrained(folder)
    return str(folder)


def slice_dimensions(like: str | None, *, tensor: int, layers: int, on_gpu: bool) -> ModelDimensions:
    """Return the dimensions of a slice: `layers` layers, as one of `tensor` tensor-parallel ranks holds them.

    Args:
        like: the value of `Settings.like`.

    Raises:
        ConfigError: with a one-line message, if the model does not exist or has experts, or if `tensor` or `layers`
            do not fit it.
    """
    whole = STAND_IN if like is None and not on_gpu else _read_like(like or DEFAULT_LIKE)
    require(not whole.experts, "--like", like, "a model without experts")
    fault = layout_fault(dataclasses.replace(whole, layers=1), ParallelConfig(tensor=tensor), tensor)
    if fault is not None:
        raise ConfigError(fault.replace("parallel.tensor is", "--tensor is"))
    if like is None and not on_gpu:
        layers = min(layers, whole.layers)
    require(1 <= layers <= whole.layers, "--layers", layers, f"1 to {whole.layers}, the model's")
    return dataclasses.replace(
        whole,
        layers=layers,
        heads=whole.heads // tensor,
        kv_heads=whole.kv_heads // tensor,
        ffn=whole.ffn // tensor,
        vocab=1024,  # small, because the checks do not test output layer and embedding
        tied=False,
    )


def _read_like(like: str) -> ModelDimensions:
    try:
        return model_dimensions(like)[0]
    except ConfigError as error:
        if Path(like).is_dir():
            raise ConfigError(f"--like: {error}") from None
        raise ConfigError(
            f"--like is {like!r}; allowed: a folder with config.json, or a name that tools/plan.py --model lists"
        ) from None


def _hf_config(dimensions: ModelDimensions, max_positions: int) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(
        dimensions.architecture,
        vocab_size=dimensions.vocab,
        hidden_size=dimensions.hidden,
        intermediate_size=dimensions.ffn,
        num_hidden_layers=dimensions.layers,
        num_attention_heads=dimensions.heads,
        num_key_value_heads=dimensions.kv_heads,
        head_dim=dimensions.head_dim,
        max_position_embeddings=max_positions,
        tie_word_embeddings=dimensions.tied,
        rms_norm_eps=1e-6,
        bos_token_id=None,
        eos_token_id=0,
    )
