"""Memory that a micro-batch keeps for the backward pass, layer by layer as in Transformer Engine's modules, in bytes.

Attention is a fused kernel that stores no [T, T] matrix, so a layer's bytes are proportional to the number of tokens
T. Under sequence parallelism the residual stream and the norms hold T / tensor tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.plan.dimensions import ModelDimensions

FLOAT32_BYTES = 4
LOGIT_CHUNK_TOKENS = 512
"""Equal to the default of model.logprobs.token_logprobs."""
LOGIT_CHUNK_COPIES = 4
"""Number of float32 tensors of a chunk that exist at once in the backward pass of token_logprobs."""

EXPERT_CROWDING = 1.25
"""Tokens of the busiest expert-parallel rank, relative to the mean; the other ranks wait for it. A round figure: no
token is dropped, so a router that prefers few experts needs more memory and time.
"""


@dataclass(frozen=True, kw_only=True)
class MicrobatchShape:
    """One packed micro-batch on one rank."""

    dimensions: ModelDimensions
    parallel: ParallelConfig
    tokens: int
    """Number of tokens on the rank: all of the micro-batch, or its share under context parallelism."""
    element_bytes: int
    """Bytes per element of weights and activations: 2 in bfloat16, 4 in float32."""
    fp8_bytes: float = 0.0
    """Bytes per value, scales included, of an input that a linear layer keeps in FP8; 0: no FP8."""

    @property
    def residual_bytes(self) -> int:
        """Bytes of the hidden states between two layers, on this rank."""
        tokens = self.tokens
        if self.parallel.sequence:
            tokens = -(-tokens // self.parallel.tensor)
        return tokens * self.dimensions.hidden * self.element_bytes

    @property
    def gathered_bytes(self) -> int:
        """Bytes of all tokens' hidden states, which are a linear layer's input under sequence parallelism."""
        return self.tokens * self.dimensions.hidden * self.element_bytes

    @property
    def ring_bytes(self) -> int:
        """Bytes of keys and values that are sent around the context-parallel ranks, and of their gradients in the
        backward pass; received and sent buffers exist at the same time.
        """
        if self.parallel.context == 1:
            return 0
        return 4 * 2 * self.tokens * self.dimensions.kv_width // self.parallel.tensor * self.element_bytes

    @property
    def attention_statistics_bytes(self) -> int:
        """Bytes of the softmax normalisers that fused attention keeps, one float32 per token and head."""
        return self.tokens * self.dimensions.heads // self.parallel.tensor * FLOAT32_BYTES

    @property
    def layer_bytes(self) -> int:
        """Bytes that one layer saves without recomputation."""
        d, tensor = self.dimensions, self.parallel.tensor
        # q, k, v as projected; q and k after rotation; attention's output.
        attention = 3 * d.query_width + 3 * d.kv_width
        if d.has_qk_norms:
            attention += d.query_width + d.kv_width  # q and k before their norms
        wide = self.tokens * attention // tensor * self.element_bytes
        if self.fp8_bytes:  # attention keeps its output, and the output projection an FP8 copy of it
            wide += self._input_bytes(self.tokens * d.query_width // tensor)
        # Each of the two norms saves its input; the linear layer after the norm saves the norm's output.
        norms = 2 * self.residual_bytes + 2 * self._input_bytes(self.residual_bytes // self.element_bytes)
        return norms + wide + self.feed_forward_bytes + self.attention_statistics_bytes

    @property
    def feed_forward_bytes(self) -> int:
        """Bytes that the feed-forward part of a layer saves, without its input."""
        d = self.dimensions
        if not d.experts:
            # The outputs of the gate and up projections, and their gated product.
            width = d.ffn // self.parallel.tensor
            return self.tokens * 2 * width * self.element_bytes + self._input_bytes(self.tokens * width)
        # Every chosen expert saves gate, up and their product, and the copy of the token that the expert receives.
        experts = self.routed_tokens * 2 * d.ffn * self.element_bytes
        experts += self._input_bytes(self.routed_tokens * (d.hidden + d.ffn))
        # The router's logits, weights and choices.
        return experts + self.tokens // self.parallel.tensor * d.experts * (2 * FLOAT32_BYTES + 1)

    def _input_bytes(self, elements: int) -> int:
        """Bytes of an input with this number of elements, as a linear layer saves it."""
        return int(elements * (self.fp8_bytes or self.element_bytes))

    @property
    def routed_tokens(self) -> int:
        """Number of tokens that the rank's experts compute; a token counts once for each expert that it chose."""
        crowding = EXPERT_CROWDING if self.parallel.expert > 1 else 1.0
        # Under sequence parallelism each rank routes only its own part of the tokens.
        return int(crowding * self.tokens * self.dimensions.experts_per_token / self.parallel.tensor)

    def saved_layer_bytes(self, recompute: str) -> int:
        """Bytes that one layer keeps from the forward to the backward pass, by `model.recompute`."""
        if recompute == "full":
            return self.residual_bytes
        if recompute == "selective":
            # Fused attention keeps its inputs and output in any case; recomputation saves only the normalisers.
            return self.layer_bytes - self.attention_statistics_bytes
        return self.layer_bytes

    def backward_workspace_bytes(self, recompute: str) -> int:
        """Bytes that exist only during one layer's backward pass: gradients, gathered inputs, recomputed
        activations.
        """
        d = self.dimensions
        gradients = 3 * self.tokens * d.ffn // self.parallel.tensor * self.element_bytes
        if d.experts:
            gradients = self.routed_tokens * (d.hidden + 3 * d.ffn) * self.element_bytes
        # Two FP8 copies of the projections' output gradient: for the input's gradient, and for the weights' gradient.
        widest = (
            self.routed_tokens * 2 * d.ffn if d.experts else self.tokens * 2 * d.ffn // self.parallel.tensor
        )
        gradients += int(2 * widest * self.fp8_bytes)
        recomputed = {"full": self.layer_bytes, "selective": self.attention_statistics_bytes, "none": 0}
        return gradients + 2 * self.gathered_bytes + self.ring_bytes + recomputed[recompute]

    def forward_workspace_bytes(self) -> int:
        """Most bytes that exist while one layer runs without gradients."""
        return self.layer_bytes + self.gathered_bytes + self.ring_bytes

    def logit_bytes(self, *, with_gradient: bool) -> int:
        """Bytes of the last stage's logits in the model's dtype, and their gradient. Float32 copies exist for
        LOGIT_CHUNK_TOKENS tokens at a time.

        Assumes logits at all positions: if the policy does not search, almost all tokens of a micro-batch are
        sampled.
        """
        width = self.dimensions.padded_vocab(self.parallel.tensor) // self.parallel.tensor
        chunk = min(self.tokens, LOGIT_CHUNK_TOKENS) * LOGIT_CHUNK_COPIES * width * FLOAT32_BYTES
        logits = self.tokens * width * self.element_bytes
        # In addition, the final norm's input and output, and the gathered input of the output layer.
        return (2 if with_gradient else 1) * logits + chunk + 2 * self.residual_bytes + self.gathered_bytes
