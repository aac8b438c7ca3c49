"""Bytes a micro-batch keeps for the backward pass, layer by layer as Transformer Engine's modules save them.

Attention is a fused kernel: no [T, T] matrix is kept, so a layer's bytes grow with the tokens T alone. Under sequence
parallelism the residual stream and the norms hold T / tensor tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.plan.dimensions import ModelDimensions

FLOAT32_BYTES = 4
LOGIT_CHUNK_TOKENS = 512
"""As the default of model.logprobs.token_logprobs."""
LOGIT_CHUNK_COPIES = 4
"""float32 tensors of a chunk alive at once in the backward pass of token_logprobs."""


@dataclass(frozen=True, kw_only=True)
class MicrobatchShape:
    """One packed micro-batch on one rank."""

    dimensions: ModelDimensions
    parallel: ParallelConfig
    tokens: int
    element_bytes: int
    """Of weights and activations: 2 in bfloat16, 4 in float32."""

    @property
    def residual_bytes(self) -> int:
        """The hidden states between two layers, on this rank."""
        tokens = self.tokens
        if self.parallel.sequence:
            tokens = -(-tokens // self.parallel.tensor)
        return tokens * self.dimensions.hidden * self.element_bytes

    @property
    def gathered_bytes(self) -> int:
        """The hidden states of all tokens, as the input of a linear layer under sequence parallelism."""
        return self.tokens * self.dimensions.hidden * self.element_bytes

    @property
    def attention_statistics_bytes(self) -> int:
        """The softmax normalisers that a fused attention keeps, one float32 a token and head."""
        return self.tokens * self.dimensions.heads // self.parallel.tensor * FLOAT32_BYTES

    @property
    def layer_bytes(self) -> int:
        """Everything one layer saves without recomputation."""
        d, tensor = self.dimensions, self.parallel.tensor
        # Projected q, k, v; q and k after rotation; attention's output.
        attention = 3 * d.query_width + 3 * d.kv_width
        if d.architecture == "qwen3":
            attention += d.query_width + d.kv_width  # q and k before their norms
        # Both projections in, and their gated product.
        feed_forward = 3 * d.ffn
        wide = self.tokens * (attention + feed_forward) // tensor * self.element_bytes
        # Two norms, each with its input and its output.
        return 4 * self.residual_bytes + wide + self.attention_statistics_bytes

    def saved_layer_bytes(self, recompute: str) -> int:
        """What one layer keeps from forward to backward under model.recompute."""
        if recompute == "full":
            return self.residual_bytes
        if recompute == "selective":
            # A fused attention keeps its inputs and its output in any case; only the normalisers go.
            return self.layer_bytes - self.attention_statistics_bytes
        return self.layer_bytes

    def backward_workspace_bytes(self, recompute: str) -> int:
        """Alive only while one layer is in its backward pass: gradients, gathered inputs, what is recomputed."""
        gradients = 3 * self.tokens * self.dimensions.ffn // self.parallel.tensor * self.element_bytes
        recomputed = {"full": self.layer_bytes, "selective": self.attention_statistics_bytes, "none": 0}
        return gradients + 2 * self.gathered_bytes + recomputed[recompute]

    def forward_workspace_bytes(self) -> int:
        """Alive at most while one layer runs without gradients."""
        return self.layer_bytes + self.gathered_bytes

    def logit_bytes(self, *, with_gradient: bool) -> int:
        """The last stage's logits at all positions in the model's dtype, and their gradient; float32 copies
        exist of LOGIT_CHUNK_TOKENS tokens at a time."""
        width = self.dimensions.padded_vocab(self.parallel.tensor) // self.parallel.tensor
        chunk = min(self.tokens, LOGIT_CHUNK_TOKENS) * LOGIT_CHUNK_COPIES * width * FLOAT32_BYTES
        logits = self.tokens * width * self.element_bytes
        # Beside them the final norm's input and output, and the gathered input of the output layer.
        return (2 if with_gradient else 1) * logits + chunk + 2 * self.residual_bytes + self.gathered_bytes
