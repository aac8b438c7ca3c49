"""Compute how many bytes Transformer Engine's layers save for the backward pass of a micro-batch.

Fused attention stores no [T, T] matrix, so a layer's bytes are proportional to the number of tokens T. Under sequence
parallelism, a rank holds only T / tensor tokens of the residual stream and of the norms' inputs and outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.plan.dimensions import ModelDimensions

FLOAT32_BYTES = 4
LOGIT_CHUNK_TOKENS = 512
"""Number of tokens whose float32 logits exist at a time. It equals the default `chunk_size` of
model.logprobs.token_logprobs."""
LOGIT_CHUNK_COPIES = 4
"""Number of float32 tensors per chunk of tokens that exist at once in the backward pass of token_logprobs."""

EXPERT_CROWDING = 1.25
"""Tokens of the busiest expert-parallel rank, divided by the mean over all ranks. The value is a guess."""


@dataclass(frozen=True, kw_only=True)
class MicrobatchShape:
    """The sizes that determine how much memory one packed micro-batch takes on one rank."""

    dimensions: ModelDimensions
    parallel: ParallelConfig
    tokens: int
    """Number of tokens on the rank. Under context parallelism, a rank has only a part of the micro-batch."""
    element_bytes: int
    fp8_bytes: float = 0.0
    """Bytes per value, scales included, of an input that a linear layer keeps in FP8. 0 means that FP8 is off."""
    adapter_width: int = 0
    """Number of values per token between A and B, over all adapters of a layer."""

    @property
    def residual_bytes(self) -> int:
        """Bytes of the hidden states between two layers on this rank."""
        tokens = self.tokens
        if self.parallel.sequence:
            tokens = -(-tokens // self.parallel.tensor)
        return tokens * self.dimensions.hidden * self.element_bytes

    @property
    def gathered_bytes(self) -> int:
        """Bytes of all tokens' hidden states, which sequence parallelism gathers as a linear layer's input."""
        return self.tokens * self.dimensions.hidden * self.element_bytes

    @property
    def ring_bytes(self) -> int:
        """Bytes of the send and receive buffers for keys, values and their gradients in context parallelism."""
        if self.parallel.context == 1:
            return 0
        return 4 * 2 * self.tokens * self.dimensions.kv_width // self.parallel.tensor * self.element_bytes

    @property
    def attention_statistics_bytes(self) -> int:
        """Bytes of the softmax normalisers that fused attention keeps: one float32 value per token and head."""
        return self.tokens * self.dimensions.heads // self.parallel.tensor * FLOAT32_BYTES

    @property
    def layer_bytes(self) -> int:
        """Bytes that one layer saves for the backward pass if nothing is recomputed."""
        d, tensor = self.dimensions, self.parallel.tensor
        # The attention saves the projected q, k and v, the rotated q and k, and its output.
        attention = 3 * d.query_width + 3 * d.kv_width
        if d.has_qk_norms:
            attention += d.query_width + d.kv_width  # q and k before their norms
        wide = self.tokens * attention // tensor * self.element_bytes
        if self.fp8_bytes:  # the output projection saves an FP8 copy of attention's output
            wide += self._input_bytes(self.tokens * d.query_width // tensor)
        # Each of the two norms saves its input. The linear layer after a norm saves the norm's output.
        norms = 2 * self.residual_bytes + 2 * self._input_bytes(self.residual_bytes // self.element_bytes)
        # An adapter saves its layer's input, which a frozen layer does not save, and the values between A and B.
        adapters = self.tokens * self.adapter_width * self.element_bytes
        return norms + wide + self.feed_forward_bytes + self.attention_statistics_bytes + adapters

    @property
    def feed_forward_bytes(self) -> int:
        """Bytes that the feed-forward part of a layer saves, without its input."""
        d = self.dimensions
        if not d.experts:
            # A dense layer saves the outputs of the gate and up projections, and their gated product.
            width = d.ffn // self.parallel.tensor
            return self.tokens * 2 * width * self.element_bytes + self._input_bytes(self.tokens * width)
        # An expert saves each token that it receives, the outputs of gate and up, and their product.
        experts = self.routed_tokens * 2 * d.ffn * self.element_bytes
        experts += self._input_bytes(self.routed_tokens * (d.hidden + d.ffn))
        # The router saves its logits, weights and choices.
        return experts + self.tokens // self.parallel.tensor * d.experts * (2 * FLOAT32_BYTES + 1)

    def _input_bytes(self, elements: int) -> int:
        """Return the bytes that a linear layer saves if its input has this number of elements."""
        return int(elements * (self.fp8_bytes or self.element_bytes))

    @property
    def routed_tokens(self) -> int:
        """Number of tokens that the rank's experts compute, where each token is counted once per chosen expert."""
        crowding = EXPERT_CROWDING if self.parallel.expert > 1 else 1.0
        return int(crowding * self.tokens * self.dimensions.experts_per_token / self.parallel.tensor)

    def saved_layer_bytes(self, recompute: str) -> int:
        """Return the bytes that one layer keeps from the forward to the backward pass."""
        if recompute == "full":
            return self.residual_bytes
        if recompute == "selective":
            # Fused attention keeps its inputs and output in any case, so recomputation frees only the normalisers.
            return self.layer_bytes - self.attention_statistics_bytes
        return self.layer_bytes

    def backward_workspace_bytes(self, recompute: str) -> int:
        """Return the bytes of gradients, gathered inputs and recomputed activations in one layer's backward pass."""
        d = self.dimensions
        gradients = 3 * self.tokens * d.ffn // self.parallel.tensor * self.element_bytes
        if d.experts:
            gradients = self.routed_tokens * (d.hidden + 3 * d.ffn) * self.element_bytes
        # The gradient of a projection's output is copied to FP8 twice: once for the gradient of the input, and once
        # for the gradient of the weights.
        widest = (
            self.routed_tokens * 2 * d.ffn if d.experts else self.tokens * 2 * d.ffn // self.parallel.tensor
        )
        gradients += int(2 * widest * self.fp8_bytes)
        recomputed = {"full": self.layer_bytes, "selective": self.attention_statistics_bytes, "none": 0}
        return gradients + 2 * self.gathered_bytes + self.ring_bytes + recomputed[recompute]

    def forward_workspace_bytes(self) -> int:
        """Return the largest number of bytes that exist at once while one layer runs without gradients."""
        return self.layer_bytes + self.gathered_bytes + self.ring_bytes

    def logit_bytes(self, *, with_gradient: bool) -> int:
        """Return the bytes of the last stage's logits, their float32 copies and, if `with_gradient`, their gradient.

        Every position is assumed to have logits. If the policy makes no tool calls, almost every position has
        logits.
        """
        width = self.dimensions.padded_vocab(self.parallel.tensor) // self.parallel.tensor
        chunk = min(self.tokens, LOGIT_CHUNK_TOKENS) * LOGIT_CHUNK_COPIES * width * FLOAT32_BYTES
        logits = self.tokens * width * self.element_bytes
        # The sum includes the final norm's input and output, and the gathered input of the output layer.
        return (2 if with_gradient else 1) * logits + chunk + 2 * self.residual_bytes + self.gathered_bytes
