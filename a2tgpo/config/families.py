"""The supported families of models, and how their decoders differ (docs/models.md)."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class Family:
    """A decoder with grouped-query attention, RMS norms, rotary embeddings and SwiGLU feed-forward layers."""

    weight_table: str
    """The model_type under which mbridge has a table of this family's weight names."""
    has_qkv_biases: bool = False
    """Whether the projections to queries, keys and values have biases."""
    has_qk_norms: bool = False
    """Whether each head's queries and keys are normalised before the rotation."""
    has_experts: bool = False
    """Whether the feed-forward layers are mixtures of experts."""


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(weight_table="llama"),
        "mistral": Family(weight_table="llama"),
        "qwen2": Family(weight_table="qwen2", has_qkv_biases=True),
        "qwen3": Family(weight_table="qwen3", has_qk_norms=True),
        "qwen3_moe": Family(weight_table="qwen3_moe", has_qk_norms=True, has_experts=True),
    }
)
"""The supported families, by the `model_type` of config.json."""
