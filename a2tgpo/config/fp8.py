"""8-bit floating point in the trainer's linear layers and in the engine: formats, scaling, and allowed layouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.io.errors import require

Format = Literal["none", "hybrid", "e4m3"]
# Without "delayed", which learns its scales in training passes: scoring before the first training pass, a reference
# and a resumed run would compute with other scales, and ratios would not start at 1 (docs/fp8.md).
Recipe = Literal["blockwise", "tensorwise", "mxfp8"]
TOKEN_MULTIPLES: dict[Recipe, int] = {"blockwise": 128, "tensorwise": 16, "mxfp8": 32}
"""By recipe, the number that must divide a rank's tokens: the weight gradient sums over tokens, scaled in blocks.
FP8 matrix products need 16; MXFP8's blocks have 32 tokens, the others' 128."""
CHANNEL_MULTIPLES: dict[Recipe, int] = {"blockwise": 16, "tensorwise": 16, "mxfp8": 32}
"""By recipe, the number that must divide the sizes of a rank's weight matrices."""
CAPABILITIES: dict[Recipe, tuple[tuple[int, int], tuple[int, int]]] = {
    "tensorwise": ((8, 9), (99, 0)),
    "blockwise": ((9, 0), (99, 0)),
    "mxfp8": ((10, 0), (12, 0)),
}
"""By recipe, the GPUs that support it: the lowest compute capability, and the first one that is too high."""
ENGINE_CAPABILITY = (8, 9)
"""Lowest compute capability at which an engine can be quantised."""
ENGINE_BLOCK = 128
"""Channels that share a scale in an engine with rollout.quantization=fp8."""


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """FP8 in the linear layers of the decoder, by Transformer Engine; see docs/fp8.md.

    Attention, norms, embedding and LM head stay in bfloat16; log-probs, loss and optimizer stay in float32. The
    optimizer updates bfloat16 weights as without FP8; matrix products quantise them.
    """

    format: Format = "none"
    """hybrid: values in e4m3, gradients of activations in e5m2. e4m3: both in e4m3."""
    recipe: Recipe = "blockwise"
    """The values that share a scale: blocks of 1x128 activations and 128x128 weights (blockwise), whole tensors, or
    blocks of 1x32 (mxfp8, on Blackwell)."""
    param_gather: bool = False
    """Store and gather the weights themselves in FP8; refused, see docs/fp8.md."""
    first_layers_bf16: int = 0
    """Number of first decoder layers that stay in bfloat16; at most those of one pipeline stage."""
    last_layers_bf16: int = 0
    """Number of last decoder layers that stay in bfloat16; at most those of one pipeline stage."""

    def __post_init__(self) -> None:
        for name in ("first_layers_bf16", "last_layers_bf16"):
            require(getattr(self, name) >= 0, f"model.fp8.{name}", getattr(self, name), ">= 0")
        # The optimizer copies its float32 weights from the layers' initial values, before a checkpoint is read
        # (megatron/core/optimizer/distrib_optimizer.py:385), and refit and checkpoints read bfloat16.
        require(
            not self.param_gather,
            "model.fp8.param_gather",
            self.param_gather,
            "false; with FP8 weights the optimizer would start from other values than the checkpoint's "
            "(docs/fp8.md); model.fp8.format computes in FP8 on bfloat16 weights",
        )
        for name, unset in (("recipe", "blockwise"), ("first_layers_bf16", 0), ("last_layers_bf16", 0)):
            require(
                self.enabled or getattr(self, name) == unset,
                f"model.fp8.{name}",
                getattr(self, name),
                f"{unset} with model.fp8.format none, which leaves all layers in model.dtype; set "
                "model.fp8.format=hybrid or e4m3",
            )

    @property
    def enabled(self) -> bool:
        return self.format != "none"

    @property
    def token_multiple(self) -> int:
        """The number that must divide the tokens in a rank's activations."""
        return TOKEN_MULTIPLES[self.recipe] if self.enabled else 1

    @property
    def channel_multiple(self) -> int:
        """The number that must divide the sizes of a rank's weight matrices."""
        return CHANNEL_MULTIPLES[self.recipe] if self.enabled else 1

    def bf16_layers(self, stage: int, pipeline: int) -> int:
        """Return how many decoder layers of pipeline stage `stage` stay in bfloat16."""
        first = self.first_layers_bf16 if stage == 0 else 0
        last = self.last_layers_bf16 if stage == pipeline - 1 else 0
        return first + last


@dataclass(frozen=True, kw_only=True)
class LinearSizes:
    """Sizes of a decoder's linear layers, in channels."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """Feed-forward channels; in a mixture of experts, those of one expert."""
    has_experts: bool

    @classmethod
    def of(cls, hf_config: Any) -> LinearSizes:
        """Return the sizes in a Hugging Face configuration."""
        has_experts = hf_config.model_type == "qwen3_moe"
        heads = hf_config.num_attention_heads
        return cls(
            hidden=hf_config.hidden_size,
            heads=heads,
            kv_heads=getattr(hf_config, "num_key_value_heads", None) or heads,
            head_dim=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads,
            ffn=hf_config.moe_intermediate_size if has_experts else hf_config.intermediate_size,
            has_experts=has_experts,
        )


def fp8_layout_fault(
    fp8: Fp8Config, parallel: ParallelConfig, sizes: LinearSizes, *, num_layers: int
) -> str | None:
    """Return in one line why the trainer cannot compute in `fp8` in this layout; None if it can or FP8 is off."""
    if not fp8.enabled:
        return None
    multiple, tensor = fp8.channel_multiple, parallel.tensor
    if sizes.has_experts:  # tensor parallelism does not divide experts
        feed_forward = (sizes.ffn, "channels of an expert")
    else:
        feed_forward = (sizes.ffn // tensor, "feed-forward channels")
    for size, what in (
        (sizes.hidden, "hidden channels"),
        ((sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim // tensor, "query, key and value channels"),
        (sizes.heads * sizes.head_dim // tensor, "channels of attention heads"),
        feed_forward,
    ):
        if size % multiple:
            return (
                f"model.fp8.format is {fp8.format!r}; allowed: none, since a rank has {size} {what} of this "
                f"model, and recipe {fp8.recipe} needs multiples of {multiple} (parallel.tensor is {tensor}; a "
                "smaller value may help)"
            )
    kept = fp8.first_layers_bf16 + fp8.last_layers_bf16
    if kept >= num_layers:
        return (
            f"model.fp8.first_layers_bf16 and last_layers_bf16 sum to {kept}; allowed: less than the model's "
            f"{num_layers} layers, otherwise no layer computes in FP8"
        )
    stages = parallel.stage_layers(num_layers)
    for name, stage_layers in (("first_layers_bf16", stages[0]), ("last_layers_bf16", stages[-1])):
        # Megatron limits both settings to an even share, even with uneven stages (transformer_config.py:995).
        most = min(stage_layers, num_layers // parallel.pipeline)
        if getattr(fp8, name) > most:
            return (
                f"model.fp8.{name} is {getattr(fp8, name)}; allowed: at most {most}, since the stages have "
                f"{stages} of the model's {num_layers} layers"
            )
    return None


def quantization_fault(quantization: str, tensor_parallel: int, sizes: LinearSizes) -> str | None:
    """Return in one line why an engine's linear layers cannot be quantised like this; None if they can.

    A token's activations are scaled in blocks along the channels that a rank's matrices sum over. vLLM asserts that
    these blocks are whole (fp8_utils.py, per_token_group_quant_fp8), but pads experts (online/fp8.py,
    maybe_roundup_sizes).
    """
    if quantization != "fp8":
        return None
    summed_over = [
        (sizes.hidden, "hidden channels"),
        (sizes.heads * sizes.head_dim, "channels of attention heads"),
    ]
    if not sizes.has_experts:
        summed_over.append((sizes.ffn, "feed-forward channels"))
    for size, what in summed_over:
        held = size if what == "hidden channels" else size // tensor_parallel
        if held % ENGINE_BLOCK:
            return (
                f"rollout.quantization is 'fp8'; allowed: none | fp8_per_channel, since a rank of the engine "
                f"has {held} {what}, not a multiple of {ENGINE_BLOCK} (rollout.tensor_parallel is "
                f"{tensor_parallel})"
            )
    return None
