"""Reading a Hugging Face checkpoint's configuration, and refusing what the model here cannot express."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig

from a2tgpo.config.check import ConfigError
from a2tgpo.error_line import first_line
from a2tgpo.model.experts import has_experts, refuse_unsupported_experts

ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3_moe")
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

# What Megatron's RotaryEmbedding._apply_scaling has built in (rotary_pos_embedding.py:90); only `factor` varies.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def load_hf_config(path: str) -> PretrainedConfig:
    """The configuration of the checkpoint in folder `path`; nothing is looked up on a network.

    Raises:
        ConfigError: one line, if the folder, its config.json or its weights are missing or malformed, or if the
            architecture is none of Llama, Qwen2, Qwen3, Qwen3-MoE.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"model.path {path!r} is not a folder; give one with config.json and *.safetensors")
    raw = _read_json(folder / "config.json")
    model_type = raw.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ConfigError(
            f"model.path {path!r}: config.json has model_type {model_type!r}; allowed: {' | '.join(ARCHITECTURES)}"
        )
    for name in _SIZES:
        size = raw.get(name)  # what is left out, or null, has a default
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
    _require_sizes_of_weights(path, raw)
    try:
        hf_config = AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers raises whatever a bad field leads to
        raise ConfigError(f"model.path {path!r}: config.json is malformed: {first_line(error)}") from error
    _refuse_unsupported(path, hf_config)
    if getattr(hf_config, "head_dim", None) is None:
        hf_config.head_dim = hf_config.hidden_size // hf_config.num_attention_heads
    return hf_config


def weight_files(path: str) -> dict[str, Path]:
    """Safetensors files of a checkpoint by name, those its index lists if it has one; only headers are read.

    Raises:
        ConfigError: if there are none, one that the index lists is missing, or one is damaged or cut short.
    """
    folder = Path(path)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed = _read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise ConfigError(f"model.path {path!r}: {index.name} lists no files by weight; fetch it again")
        names = sorted(set(listed.values()))
    else:
        names = sorted(file.name for file in folder.glob("*.safetensors"))
    if not names:
        raise ConfigError(
            f"model.path {path!r} holds no *.safetensors; convert the checkpoint to safetensors"
        )
    for name in names:
        if not (folder / name).is_file():
            raise ConfigError(
                f"model.path {path!r}: {name} is listed in {index.name} but missing; fetch it again"
            )
        try:
            # Compares the file's size with what its header lists.
            with safe_open(folder / name, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"model.path {path!r}: {name} is damaged: {error}; fetch it again") from error
    return {name: folder / name for name in names}


def _require_sizes_of_weights(path: str, raw: dict) -> None:
    """Refuse sizes in config.json that are not those of the weights, as their headers say.

    The model is made before its weights are read: a wrong digit could make one that no machine holds. What `raw`
    leaves out is not looked at.
    """
    hidden = raw.get("hidden_size")
    last = f"model.layers.{(raw.get('num_hidden_layers') or 1) - 1}."
    heads, head_dim = raw.get("num_attention_heads"), raw.get("head_dim")
    queries = heads * head_dim if heads and head_dim else None
    attention = f"{last}self_attn.q_proj.weight"
    expected = {
        "model.embed_tokens.weight": (raw.get("vocab_size"), hidden),
        attention: (queries, hidden),
        f"{last}mlp.gate_proj.weight": (raw.get("intermediate_size"), hidden),
    }
    shapes: dict[str, list[int]] = {}
    for file in weight_files(path).values():
        with safe_open(file, framework="np") as tensors:
            for name in expected.keys() & set(tensors.keys()):
                shapes[name] = tensors.get_slice(name).get_shape()
    if attention not in shapes:
        raise ConfigError(
            f"model.path {path!r}: tensor {attention} is missing from its safetensors; "
            f"config.json has num_hidden_layers {raw.get('num_hidden_layers')}"
        )
    for name, shape in shapes.items():
        wanted = expected[name]
        if len(shape) != 2 or any(
            size not in (None, found) for size, found in zip(wanted, shape, strict=True)
        ):
            raise ConfigError(
                f"model.path {path!r}: config.json and weights disagree: {name} is {shape}, by config.json "
                f"{list(wanted)}"
            )


def architecture_of(hf_config: PretrainedConfig) -> dict[str, str | int | bool]:
    """What decides which parameters the model has and their shapes, by its name in config.json.

    The type stands for what architectures of the same sizes differ in: biases on q, k, v, norms of q and k.
    """
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


@dataclass(frozen=True)
class RopeParameters:
    """Rotary position embedding, in the terms Megatron takes."""

    base: float
    interpolation: float | None
    """Positions are divided by this ("linear" scaling); None: they are not."""
    llama3_factor: float | None
    """Scale factor of Llama 3's frequency-dependent scaling; None: no scaling."""


def rope_parameters(path: str, hf_config: PretrainedConfig) -> RopeParameters:
    """The checkpoint's rotary embedding.

    Raises:
        ConfigError: for a scaling that Megatron's GPT model does not compute the same way.
    """
    # transformers 5 keeps theta and scaling in one dictionary; there is no `rope_theta` attribute any more.
    rope = dict(hf_config.rope_parameters)
    kind = rope.get("rope_type", "default")
    try:
        base = float(rope["rope_theta"])
    except (KeyError, TypeError, ValueError):
        raise ConfigError(
            f"model.path {path!r}: config.json has rope_theta {rope.get('rope_theta')!r}; allowed: a number"
        ) from None
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"model.path {path!r}: partial_rotary_factor {rope['partial_rotary_factor']}; allowed: 1"
        )
    if kind == "default":
        return RopeParameters(base=base, interpolation=None, llama3_factor=None)
    if kind == "linear":
        return RopeParameters(base=base, interpolation=float(rope["factor"]), llama3_factor=None)
    if kind == "llama3" and all(float(rope.get(key, 0)) == value for key, value in _LLAMA3_ROPE.items()):
        return RopeParameters(base=base, interpolation=None, llama3_factor=float(rope["factor"]))
    raise ConfigError(
        f"model.path {path!r}: rope scaling {rope} is not supported; allowed: default | linear | llama3 with "
        f"{_LLAMA3_ROPE}"
    )


def _refuse_unsupported(path: str, hf_config: PretrainedConfig) -> None:
    """Raise `ConfigError` for options of these architectures that would be ignored, and so be silently wrong."""
    where = f"model.path {path!r}: config.json has"
    if hf_config.hidden_act != "silu":
        raise ConfigError(f"{where} hidden_act {hf_config.hidden_act!r}; allowed: silu")
    # Qwen2's bias on q, k, v is part of the architecture; this option also puts one on the output projection.
    for option in ("attention_bias", "mlp_bias"):
        if getattr(hf_config, option, False):
            raise ConfigError(f"{where} {option} true; allowed: false")
    if "sliding_attention" in (getattr(hf_config, "layer_types", None) or ()):
        raise ConfigError(
            f"{where} sliding-window layers; allowed: full attention (use_sliding_window false)"
        )
    if getattr(hf_config, "quantization_config", None) is not None:
        raise ConfigError(
            f"{where} quantization_config; allowed: a checkpoint in bfloat16, float16 or float32"
        )
    if has_experts(hf_config):
        refuse_unsupported_experts(where, hf_config)
    rope_parameters(path, hf_config)


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
