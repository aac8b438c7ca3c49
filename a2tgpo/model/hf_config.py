"""Read a Hugging Face checkpoint's configuration, and refuse unsupported options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, PretrainedConfig

from a2tgpo.config.families import FAMILIES
from a2tgpo.data.weight_files import weight_files, weight_shapes
from a2tgpo.io.errors import ConfigError, first_line
from a2tgpo.model.experts import has_experts, refuse_unsupported_experts
from a2tgpo.model.rope import rope_of

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "head_dim",
)
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_COMPARED_ROWS = 8192
"""Number of rows that are read at a time to compare two tensors on disk."""


def load_hf_config(path: str) -> PretrainedConfig:
    """Return the configuration of the checkpoint in folder `path`, without network access.

    Raises:
        ConfigError: with a one-line message, if the folder, its config.json or its weights are missing or malformed,
            or if the model belongs to no supported family.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"model.path {path!r} is not a folder; give one with config.json and *.safetensors")
    raw = _read_json(folder / "config.json")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(
            f"model.path {path!r}: config.json has model_type {model_type!r}; allowed: {' | '.join(FAMILIES)}"
        )
    for name in _SIZES:
        size = raw.get(name)  # a missing or null field has a default
        if size is not None and (type(size) is not int or size < 1):
            raise ConfigError(
                f"model.path {path!r}: config.json has {name} {size!r}; allowed: an integer >= 1"
            )
    heads, kv_heads = raw.get("num_attention_heads"), raw.get("num_key_value_heads")
    if heads is not None and kv_heads is not None and heads % kv_heads:
        raise ConfigError(
            f"model.path {path!r}: config.json has num_key_value_heads {kv_heads}; allowed: a divisor of "
            f"num_attention_heads ({heads})"
        )
    shapes = weight_shapes(path)
    _require_sizes_of_weights(path, raw, shapes)
    try:
        hf_config = AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers may raise any type of exception for a bad field
        raise ConfigError(f"model.path {path!r}: config.json is malformed: {first_line(error)}") from error
    if getattr(hf_config, "head_dim", None) is None:
        hf_config.head_dim = hf_config.hidden_size // hf_config.num_attention_heads
    _refuse_unsupported(path, hf_config)
    _require_the_stated_head(path, hf_config, shapes)
    return hf_config


def _require_sizes_of_weights(path: str, raw: dict, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise `ConfigError` if a size in config.json differs from the shapes in the weights' headers.

    A wrong size could make the model too large for memory, because the model is built before the weights are read.
    """
    hidden = raw.get("hidden_size")
    last = f"model.layers.{(raw.get('num_hidden_layers') or 1) - 1}."
    heads, head_dim = raw.get("num_attention_heads"), raw.get("head_dim")
    queries = heads * head_dim if heads and head_dim else None
    attention = f"{last}self_attn.q_proj.weight"
    expected = {
        _EMBEDDING: (raw.get("vocab_size"), hidden),
        attention: (queries, hidden),
        f"{last}mlp.gate_proj.weight": (raw.get("intermediate_size"), hidden),
    }
    if attention not in shapes:
        raise ConfigError(
            f"model.path {path!r}: tensor {attention} is missing from its safetensors; "
            f"config.json has num_hidden_layers {raw.get('num_hidden_layers')}"
        )
    for name, wanted in expected.items():
        if name not in shapes:
            continue
        shape = shapes[name]
        if len(shape) != 2 or any(
            size not in (None, found) for size, found in zip(wanted, shape, strict=True)
        ):
            raise ConfigError(
                f"model.path {path!r}: config.json and weights disagree: {name} is {list(shape)}, by config.json "
                f"{list(wanted)}"
            )


def _require_the_stated_head(
    path: str, hf_config: PretrainedConfig, shapes: dict[str, tuple[int, ...]]
) -> None:
    """Raise `ConfigError` if the stored output head contradicts tie_word_embeddings in config.json.

    If embeddings are tied, Megatron uses the embedding as the head, but transformers uses the head in the files if
    there is one. Therefore the two tensors must be equal.
    """
    if not hf_config.tie_word_embeddings:
        if _HEAD not in shapes:
            raise ConfigError(
                f"model.path {path!r}: tensor {_HEAD} is missing from its safetensors, and config.json has "
                "tie_word_embeddings false; fetch the weights again, or set tie_word_embeddings to true if the model "
                "has no head of its own"
            )
    elif _HEAD in shapes and _EMBEDDING in shapes and not _are_equal_on_disk(path, shapes, _HEAD, _EMBEDDING):
        raise ConfigError(
            f"model.path {path!r}: config.json has tie_word_embeddings true, but {_HEAD} differs from {_EMBEDDING}; "
            f"set tie_word_embeddings to false to use that head, or remove {_HEAD} from the safetensors"
        )


def _are_equal_on_disk(path: str, shapes: dict[str, tuple[int, ...]], one: str, other: str) -> bool:
    """Return whether two stored tensors have the same values. Only a few thousand rows are read at a time."""
    if shapes[one] != shapes[other]:
        return False
    held: dict[str, Any] = {}
    for file in weight_files(path).values():
        tensors = safe_open(file, framework="pt")
        held.update({name: tensors.get_slice(name) for name in {one, other} & set(tensors.keys())})
    rows = range(0, shapes[one][0], _COMPARED_ROWS)
    return all(
        torch.equal(
            held[one][row : row + _COMPARED_ROWS].float(), held[other][row : row + _COMPARED_ROWS].float()
        )
        for row in rows
    )


def architecture_of(hf_config: PretrainedConfig) -> dict[str, str | int | bool]:
    """Return the fields of config.json that determine the model's parameters and their shapes."""
    names = [
        "model_type",
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "tie_word_embeddings",
    ]
    if has_experts(hf_config):
        names += ["num_experts", "moe_intermediate_size"]
    return {name: getattr(hf_config, name) for name in names}


def _refuse_unsupported(path: str, hf_config: PretrainedConfig) -> None:
    """Raise `ConfigError` if config.json sets an option that the Megatron model would silently ignore."""
    where = f"model.path {path!r}: config.json has"
    if hf_config.hidden_act != "silu":
        raise ConfigError(f"{where} hidden_act {hf_config.hidden_act!r}; allowed: silu")
    # Even without these options, Qwen2 has biases on q, k and v. attention_bias also adds a bias to the output
    # projection.
    for option in ("attention_bias", "mlp_bias"):
        if getattr(hf_config, option, False):
            raise ConfigError(f"{where} {option} true; allowed: false")
    if _has_sliding_windows(hf_config):
        raise ConfigError(
            f"{where} sliding-window layers; allowed: full attention (use_sliding_window false, or sliding_window "
            "null in a family without use_sliding_window)"
        )
    if getattr(hf_config, "quantization_config", None) is not None:
        raise ConfigError(
            f"{where} quantization_config; allowed: a checkpoint in bfloat16, float16 or float32"
        )
    if has_experts(hf_config):
        refuse_unsupported_experts(where, hf_config)
    rope_of(path, hf_config)


def _has_sliding_windows(hf_config: PretrainedConfig) -> bool:
    """Return whether attention in any layer is limited to a window."""
    layer_types = getattr(hf_config, "layer_types", None)
    if layer_types:
        return "sliding_attention" in layer_types
    return getattr(hf_config, "sliding_window", None) is not None


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"model.path {str(file.parent)!r} has no {file.name}; give a checkpoint folder"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds a {type(content).__name__}; allowed: a JSON object")
    return content
