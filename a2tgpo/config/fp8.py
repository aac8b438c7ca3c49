"""Settings of 8-bit floating point (FP8) in the trainer, and functions that check whether a layout allows FP8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from a2tgpo.config.families import FAMILIES
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.io.errors import require

Format = Literal["none", "hybrid", "e4m3"]
# The recipe "delayed" learns its scales in training passes. A reference model, a resumed run, and scoring before the
# first training pass would use other scales, so ratios would not start at 1 (docs/fp8.md).
Recipe = Literal["blockwise", "tensorwise", "mxfp8"]
TOKEN_MULTIPLES: dict[Recipe, int] = {"blockwise": 128, "tensorwise": 16, "mxfp8": 32}
"""Map each recipe to a number that must divide each rank's number of tokens. The weight gradient is a sum over
tokens, in which each block of tokens has one scale (128 tokens with blockwise, 32 with mxfp8). FP8 matrix products
always need a multiple of 16."""
CHANNEL_MULTIPLES: dict[Recipe, int] = {"blockwise": 16, "tensorwise": 16, "mxfp8": 32}
"""Map each recipe to a number that must divide the sizes of each rank's weight matrices."""
CAPABILITIES: dict[Recipe, tuple[tuple[int, int], tuple[int, int]]] = {
    "tensorwise": ((8, 9), (99, 0)),
    "blockwise": ((9, 0), (99, 0)),
    "mxfp8": ((10, 0), (12, 0)),
}
"""Map each recipe to the lowest compute capability that supports it, and the first higher one that does not."""
ENGINE_CAPABILITY = (8, 9)
"""Lowest compute capability of a GPU on which an engine can be quantised."""
ENGINE_BLOCK = 128
"""Number of channels that share one scale if rollout.quantization is fp8."""


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """Settings of FP8. Transformer Engine computes the decoder's linear layers in FP8 (docs/fp8.md).

    Attention, norms, embedding and LM head stay in bfloat16. Log-probs, loss and optimizer state stay in float32. The
    weights are stored in bfloat16, and each matrix product quantises the weights that it reads.
    """

    format: Format = "none"
    """`none`: no FP8. `hybrid`: weights and activations in e4m3, gradients of activations in e5m2. `e4m3`: all in
    e4m3."""
    recipe: Recipe = "blockwise"
    """Values that share one scale. `blockwise`: 1x128 activations, 128x128 weights. `tensorwise`: a whole tensor.
    `mxfp8`: 1x32 values, only on Blackwell."""
    param_gather: bool = False
    """Store the weights in FP8 and gather them in FP8 from other ranks. `true` is refused (docs/fp8.md)."""
    first_layers_bf16: int = 0
    """Number of decoder layers at the start that stay in bfloat16; at most the layers of the first pipeline stage."""
    last_layers_bf16: int = 0
    """Number of decoder layers at the end that stay in bfloat16; at most the layers of the last pipeline stage."""

    def __post_init__(self) -> None:
        for name in ("first_layers_bf16", "last_layers_bf16"):
            require(getattr(self, name) >= 0, f"model.fp8.{name}", getattr(self, name), ">= 0")
        # The optimizer copies the model's weights into its float32 weights before a checkpoint is read
        # (megatron/core/optimizer/distrib_optimizer.py:385). Refit and checkpoints expect bfloat16 weights.
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
        """A rank's number of tokens must be a multiple of this number; 1 without FP8."""
        return TOKEN_MULTIPLES[self.recipe] if self.enabled else 1

    @property
    def channel_multiple(self) -> int:
        """The sizes of a rank's weight matrices must be multiples of this number; 1 without FP8."""
        return CHANNEL_MULTIPLES[self.recipe] if self.enabled else 1

    def bf16_layers(self, stage: int, pipeline: int) -> int:
        """Return how many decoder layers of pipeline stage `stage` stay in bfloat16."""
        first = self.first_layers_bf16 if stage == 0 else 0
        last = self.last_layers_bf16 if stage == pipeline - 1 else 0
        return first + last


@dataclass(frozen=True, kw_only=True)
class LinearSizes:
    """Sizes, in channels, of a decoder's linear layers."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """Channels of the feed-forward layer, or of one expert in a mixture of experts."""
    has_experts: bool

    @classmethod
    def of(cls, hf_config: Any) -> LinearSizes:
        """Return the sizes in a model's Hugging Face configuration."""
        has_experts = FAMILIES[hf_config.model_type].has_experts
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
    """Return in one line why the trainer cannot use FP8 in this layout; None if it can, or if FP8 is off."""
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
        # Megatron limits first_layers_bf16 and last_layers_bf16 to num_layers // pipeline, even if the stages are
        # uneven (transformer_config.py:995).
        most = min(stage_layers, num_layers // parallel.pipeline)
        if getattr(fp8, name) > most:
            return (
                f"model.fp8.{name} is {getattr(fp8, name)}; allowed: at most {most}, since the stages have "
                f"{stages} of the model's {num_layers} layers"
            )
    return None


def quantization_fault(quantization: str, tensor_parallel: int, sizes: LinearSizes) -> str | None:
    """Return in one line why an engine's linear layers cannot be quantised; None if they can.

    vLLM asserts that a rank's channels form whole blocks (fp8_utils.py, per_token_group_quant_fp8). vLLM pads experts
    (online/fp8.py, maybe_roundup_sizes).
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
