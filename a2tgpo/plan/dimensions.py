"""Read a model's dimensions from config.json, or look them up in a table, so that planning needs no download."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from a2tgpo.config.families import FAMILIES
from a2tgpo.config.fp8 import LinearSizes
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.io.errors import ConfigError

VOCAB_MULTIPLE = 128
"""Equal to VOCAB_MULTIPLE in model.transformer_config. That module needs Megatron, so it cannot be imported here."""


@dataclass(frozen=True, kw_only=True)
class ModelDimensions:
    """The dimensions of a decoder that `model/` can build."""

    architecture: str
    """A key of `FAMILIES`."""
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """Feed-forward channels. In a mixture of experts, these are the channels of one expert."""
    vocab: int
    tied: bool
    """Whether the output layer uses the embedding's weight."""
    experts: int = 0
    """Number of experts per layer. 0 means that the feed-forward layers are dense."""
    experts_per_token: int = 1

    @property
    def has_qkv_biases(self) -> bool:
        return FAMILIES[self.architecture].has_qkv_biases

    @property
    def has_qk_norms(self) -> bool:
        return FAMILIES[self.architecture].has_qk_norms

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Number of key channels, which equals the number of value channels."""
        return self.kv_heads * self.head_dim

    @property
    def linear_sizes(self) -> LinearSizes:
        return LinearSizes(
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            ffn=self.ffn,
            has_experts=bool(self.experts),
        )

    def padded_vocab(self, tensor: int) -> int:
        """Return the number of embedding rows in training, padded to a multiple of VOCAB_MULTIPLE and of `tensor`."""
        multiple = math.lcm(VOCAB_MULTIPLE, tensor)
        return math.ceil(self.vocab / multiple) * multiple


def _qwen2(
    hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int, *, tied: bool
) -> ModelDimensions:
    return ModelDimensions(
        architecture="qwen2",
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        ffn=ffn,
        vocab=vocab,
        tied=tied,
    )


def _eight_kv_heads(
    architecture: str, hidden: int, layers: int, heads: int, ffn: int, vocab: int, *, tied: bool
) -> ModelDimensions:
    """Return the dimensions of a Qwen3 or Llama 3 model, which has eight key-value heads of 128 channels."""
    return ModelDimensions(
        architecture=architecture,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=8,
        head_dim=128,
        ffn=ffn,
        vocab=vocab,
        tied=tied,
    )


def _qwen3_moe(hidden: int, layers: int, heads: int, kv_heads: int, expert_ffn: int) -> ModelDimensions:
    return ModelDimensions(
        architecture="qwen3_moe",
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=128,
        ffn=expert_ffn,
        vocab=151936,
        tied=False,
        experts=128,
        experts_per_token=8,
    )


KNOWN_MODELS = {
    "qwen2.5-0.5b": _qwen2(896, 24, 14, 2, 4864, 151936, tied=True),
    "qwen2.5-1.5b": _qwen2(1536, 28, 12, 2, 8960, 151936, tied=True),
    "qwen2.5-3b": _qwen2(2048, 36, 16, 2, 11008, 151936, tied=True),
    "qwen2.5-7b": _qwen2(3584, 28, 28, 4, 18944, 152064, tied=False),
    "qwen2.5-32b": _qwen2(5120, 64, 40, 8, 27648, 152064, tied=False),
    "qwen2.5-72b": _qwen2(8192, 80, 64, 8, 29568, 152064, tied=False),
    "qwen3-0.6b": _eight_kv_heads("qwen3", 1024, 28, 16, 3072, 151936, tied=True),
    "qwen3-4b": _eight_kv_heads("qwen3", 2560, 36, 32, 9728, 151936, tied=True),
    "qwen3-8b": _eight_kv_heads("qwen3", 4096, 36, 32, 12288, 151936, tied=False),
    "qwen3-32b": _eight_kv_heads("qwen3", 5120, 64, 64, 25600, 151936, tied=False),
    "qwen3-30b-a3b": _qwen3_moe(2048, 48, 32, 4, 768),
    "qwen3-235b-a22b": _qwen3_moe(4096, 94, 64, 4, 1536),
    "llama-3.1-8b": _eight_kv_heads("llama", 4096, 32, 32, 14336, 128256, tied=False),
    "llama-3.1-70b": _eight_kv_heads("llama", 8192, 80, 64, 28672, 128256, tied=False),
    "llama-3.3-70b": _eight_kv_heads("llama", 8192, 80, 64, 28672, 128256, tied=False),
}


def model_dimensions(path: str, known: str | None = None) -> tuple[ModelDimensions, str]:
    """Return the dimensions of the model to plan for, and the source of these dimensions.

    Args:
        path: the setting `model.path`. If this folder does not exist, the known model with the folder's name is used.
            The name may have a further ending, for example -Instruct.
        known: a name in `KNOWN_MODELS`. If it is set, `path` is ignored.

    Raises:
        ConfigError: with a one-line message, if neither a readable config.json nor a known model exists.
    """
    if known is not None:
        if known not in KNOWN_MODELS:
            raise ConfigError(f"--model is {known!r}; allowed: {' | '.join(KNOWN_MODELS)}")
        return KNOWN_MODELS[known], f"built in as {known}"
    if Path(path).is_dir():
        return read_dimensions(path), f"{path}/config.json"
    name = Path(path).name.lower()
    # The longest name comes first, because a longer known name may begin with a shorter one.
    for candidate in sorted(KNOWN_MODELS, key=len, reverse=True):
        if name == candidate or name.startswith(f"{candidate}-"):
            return KNOWN_MODELS[candidate], f"built in as {candidate}; there is no folder {path}"
    raise ConfigError(
        f"model.path {path!r} is not a folder; give one with config.json, or --model with one of "
        f"{' | '.join(KNOWN_MODELS)}"
    )


def read_dimensions(path: str) -> ModelDimensions:
    """Return the dimensions that the config.json in folder `path` describes.

    Raises:
        ConfigError: with a one-line message, if the file is missing or malformed or the architecture is unsupported.
    """
    file = Path(path) / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}); give a checkpoint folder") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from None
    architecture = content.get("model_type") if isinstance(content, dict) else None
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise ConfigError(f"{file} has model_type {architecture!r}; allowed: {' | '.join(FAMILIES)}")
    try:
        heads = int(content["num_attention_heads"])
        has_experts = FAMILIES[architecture].has_experts
        # transformers 5 calls this field num_local_experts.
        experts = content.get("num_experts", content.get("num_local_experts")) if has_experts else 0
        dimensions = ModelDimensions(
            architecture=architecture,
            hidden=int(content["hidden_size"]),
            layers=int(content["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(content.get("num_key_value_heads") or heads),
            head_dim=int(content.get("head_dim") or content["hidden_size"] // heads),
            ffn=int(content["moe_intermediate_size" if has_experts else "intermediate_size"]),
            vocab=int(content["vocab_size"]),
            tied=bool(content.get("tie_word_embeddings", False)),
            experts=int(experts),
            experts_per_token=int(content["num_experts_per_tok"]) if has_experts else 1,
        )
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"{file} lacks a dimension or has a wrong one: {error!r}") from None
    for name in ("hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "vocab", "experts_per_token"):
        if not 1 <= getattr(dimensions, name) < 2**31:
            raise ConfigError(f"{file}: {name} is not in range; allowed: 1 to 2^31 - 1")
    if not 0 <= dimensions.experts < 2**31:
        raise ConfigError(f"{file}: experts is not in range; allowed: 0 to 2^31 - 1")
    return dimensions


def layout_fault(dimensions: ModelDimensions, parallel: ParallelConfig, gpus: int) -> str | None:
    """Return one line that says why the layout is impossible, or None if it is possible.

    The rules are those of model.transformer_config.check_layout, model.experts.check_expert_layout and
    parallel.initialize.check_layout.
    """
    split = [(dimensions.heads, "attention heads"), (dimensions.kv_heads, "key-value heads")]
    if not dimensions.experts:  # tensor parallelism splits dense feed-forward layers, but never an expert
        split.append((dimensions.ffn, "feed-forward channels"))
    for size, what in split:
        if size % parallel.tensor:
            return f"parallel.tensor is {parallel.tensor}; allowed: a divisor of the model's {size} {what}"
    try:
        parallel.stage_layers(dimensions.layers)
    except ConfigError as error:
        return str(error)
    if gpus % parallel.model_ranks:
        return (
            f"parallel.tensor x parallel.context x parallel.pipeline is {parallel.model_ranks}; allowed: a divisor "
            f"of the {gpus} GPUs"
        )
    return _expert_fault(dimensions, parallel, gpus // parallel.pipeline)


def _expert_fault(dimensions: ModelDimensions, parallel: ParallelConfig, stage_ranks: int) -> str | None:
    if not dimensions.experts:
        if parallel.expert > 1:
            return f"parallel.expert is {parallel.expert}; allowed: 1, since the model has no experts"
        return None
    for size, what in (
        (dimensions.experts, "model's {} experts"),
        (stage_ranks, "{} ranks of a pipeline stage"),
    ):
        if size % parallel.expert:
            return f"parallel.expert is {parallel.expert}; allowed: a divisor of the {what.format(size)}"
    if parallel.tensor > 1 and not parallel.sequence:
        return "parallel.sequence is false; allowed: true where parallel.tensor > 1 and the model has experts"
    return None
