"""Which of the trainer's linear layers compute in 8-bit floating point, and how values are scaled into it."""

from dataclasses import dataclass

from a2tgpo.config.check import require

TOKEN_MULTIPLES = {"blockwise": 128, "tensorwise": 16, "mxfp8": 32}
"""Tokens of a rank's activations come in multiples of this, by recipe: in the weight gradient, tokens are what is
summed over and scaled in blocks. FP8 matrix products take 16, MXFP8's blocks are of 32, the others' of 128."""
CHANNEL_MULTIPLES = {"blockwise": 16, "tensorwise": 16, "mxfp8": 32}
"""Sizes of a rank's weight matrices are multiples of this, by recipe."""


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """FP8 in the linear layers of the decoder, by Transformer Engine; see docs/fp8.md.

    Attention, norms, embedding and LM head stay in bfloat16, log-probs, loss and optimizer in float32. The optimizer
    steps on bfloat16 weights as without FP8; they are quantised where they are multiplied.
    """

    format: str = "none"
    """none | hybrid (values e4m3, gradients of activations e5m2) | e4m3 (all)."""
    recipe: str = "blockwise"
    """What shares a scale: blockwise (1x128 activations, 128x128 weights) | tensorwise | mxfp8 (1x32; Blackwell)."""
    param_gather: bool = False
    """Keep and gather the weights themselves in FP8; not supported yet."""
    first_layers_bf16: int = 0
    """Decoder layers at the start that stay in bfloat16; at most a pipeline stage's."""
    last_layers_bf16: int = 0
    """Decoder layers at the end that stay in bfloat16; at most a pipeline stage's."""

    def __post_init__(self) -> None:
        require(
            self.format in ("none", "hybrid", "e4m3"), "model.fp8.format", self.format, "none | hybrid | e4m3"
        )
        # Delayed scaling learns its scales in training passes. Scoring before the first of them, a reference and
        # a resumed run would compute with others: ratios would not start at 1 (docs/fp8.md).
        require(
            self.recipe in TOKEN_MULTIPLES,
            "model.fp8.recipe",
            self.recipe,
            "blockwise | tensorwise | mxfp8"
            + (" (delayed scales differ between scoring and training)" if self.recipe == "delayed" else ""),
        )
        for name in ("first_layers_bf16", "last_layers_bf16"):
            require(getattr(self, name) >= 0, f"model.fp8.{name}", getattr(self, name), ">= 0")
        # The optimizer takes its float32 weights from what the layers were made with, before a checkpoint is read
        # (megatron/core/optimizer/distrib_optimizer.py:385), and refit and checkpoints read bfloat16.
        require(
            not self.param_gather,
            "model.fp8.param_gather",
            self.param_gather,
            "false; FP8 weights are not supported yet, only FP8 arithmetic on bfloat16 weights",
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
        """What the number of tokens in a rank's activations must be a multiple of."""
        return TOKEN_MULTIPLES[self.recipe] if self.enabled else 1

    @property
    def channel_multiple(self) -> int:
        """What the sizes of a rank's weight matrices must be multiples of."""
        return CHANNEL_MULTIPLES[self.recipe] if self.enabled else 1
