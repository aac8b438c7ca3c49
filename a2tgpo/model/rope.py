"""Let transformers compute a checkpoint's rotary position embedding, and set it in Megatron's model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from a2tgpo.io.errors import ConfigError

if TYPE_CHECKING:
    from megatron.core.models.gpt.gpt_model import GPTModel

KINDS = ("default", "linear", "llama3", "yarn")
"""Supported kinds of scaling. The frequencies of other kinds depend on the sequence's length."""

_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_OPTIONAL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


@dataclass(frozen=True)
class Rope:
    """A checkpoint's rotary embedding."""

    base: float
    inverse_frequencies: torch.Tensor | None
    """[head_dim / 2] float32, radians per position. None: the unscaled frequencies base^(-2i / head_dim)."""
    attention_factor: float = 1.0
    """Factor that multiplies rotated queries and keys (YaRN's "temperature", arXiv 2309.00071, section 3.4)."""

    def softmax_scale(self, head_dim: int) -> float | None:
        """Return the factor by which attention multiplies products of queries and keys. None: 1 / sqrt(head_dim).

        Megatron's fused rotation cannot scale queries and keys, so the factor contains the square of
        `attention_factor`.
        """
        if self.attention_factor == 1.0:
            return None
        return self.attention_factor**2 / math.sqrt(head_dim)

    def apply_to(self, gpt_model: GPTModel) -> None:
        """Set the frequencies of `gpt_model`, which was built with `base`. Call this before the first pass."""
        if self.inverse_frequencies is not None:
            embedding = gpt_model.rotary_pos_emb
            embedding.inv_freq = self.inverse_frequencies.to(embedding.inv_freq)


def rope_of(path: str, hf_config: PretrainedConfig) -> Rope:
    """Return the rotary embedding of the checkpoint in folder `path`.

    Raises:
        ConfigError: with a one-line message, if a kind of scaling or a value is not supported.
    """
    # transformers 5 keeps theta and scaling in one dictionary and has no `rope_theta` attribute.
    rope = dict(hf_config.rope_parameters)
    kind = rope.get("rope_type", "default")
    where = f"model.path {path!r}: config.json has"
    if kind not in KINDS:
        raise ConfigError(
            f"{where} rope scaling {kind!r}, whose frequencies change with the length of the sequence; allowed: "
            f"{' | '.join(KINDS)}. To run without scaling, within the positions the model was trained on, remove "
            "rope_scaling (and rope_type, factor in rope_parameters) from config.json"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{where} partial_rotary_factor {rope['partial_rotary_factor']}; allowed: 1")
    for name in ("rope_theta", *_REQUIRED[kind]):
        _require_positive(where, name, rope.get(name))
    if kind == "yarn":
        for name in _OPTIONAL:
            if name in rope:
                _require_positive(where, name, rope[name])
    base = float(rope["rope_theta"])
    if kind == "default":
        return Rope(base=base, inverse_frequencies=None)
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[kind](hf_config, torch.device("cpu"))
    return Rope(base=base, inverse_frequencies=frequencies, attention_factor=float(attention_factor))


def check_positions(path: str, hf_config: PretrainedConfig, max_model_len: int) -> None:
    """Raise a one-line `ConfigError` if the model has fewer than `max_model_len` positions.

    As in the engine, the number of positions is max_position_embeddings, multiplied by the scaling factor if the
    scaling is linear. With YaRN and llama3, max_position_embeddings already includes the scaling.
    """
    rope = hf_config.rope_parameters
    positions = hf_config.max_position_embeddings
    if rope.get("rope_type") == "linear":
        positions = int(positions * rope["factor"])
    if max_model_len <= positions:
        return
    way_out = "lower data.max_prompt_tokens or rollout.max_response_tokens"
    reach = _yarn_reach(rope)
    if reach >= max_model_len:
        way_out = (
            f"set max_position_embeddings to {reach} in config.json, as far as YaRN reaches, or {way_out}"
        )
    raise ConfigError(
        f"data.max_prompt_tokens + rollout.max_response_tokens + room for a scored answer is {max_model_len}; "
        f"allowed: at most the {positions} positions of model.path {path!r} (max_position_embeddings); {way_out}"
    )


def _yarn_reach(rope: dict[str, Any]) -> int:
    """Return the length of the longest sequence that the YaRN settings support. Without YaRN, return 0."""
    if rope.get("rope_type") != "yarn":
        return 0
    return int(rope["original_max_position_embeddings"] * rope["factor"])


def _require_positive(where: str, name: str, value: Any) -> None:
    # transformers only warns about most wrong values.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{where} {name} {value!r}; allowed: a number > 0")
