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

EXPERT_CROWDING = 1.25
"""Tokens of the expert-parallel rank that the router sends most to, against the mean; the others wait for it. A round
figure: no token is dropped, so a router that prefers few experts needs more, in memory and in time."""


@dataclass(frozen=True, kw_only=True)
class MicrobatchShape:
    """One packed micro-batch on one rank."""

    dimensions: ModelDimensions
    parallel: ParallelConfig
    tokens: int
    """That the rank holds: all of the micro-batch's, or its share under context parallelism."""
    element_bytes: int
    """Of weights and activations: 2 in bfloat16, 4 in float32."""
    fp8_bytes: float = 0.0
    """Of a value of its input that a linear layer keeps in FP8, its share of a scale included; 0: no FP8."""

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
    def ring_bytes(self) -> int:
        """Keys and values on their way around the context-parallel ranks, and in the backward pass their gradients:
        those that came in and those that go out."""
        if self.parallel.context == 1:
            return 0
        return 4 * 2 * self.tokens * self.dimensions.kv_width // self.parallel.tensor * self.element_bytes

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
        if d.has_qk_norms:
            attention += d.query_width + d.kv_width  # q and k before their norms
        wide = self.tokens * attention // tensor * self.element_bytes
        if self.fp8_bytes:  # attention keeps its output, and the projection behind it a copy in FP8
            wide += self._input_bytes(self.tokens * d.query_width // tensor)
        # Two norms, each with its input, and its output as the next linear layer keeps it.
        norms = 2 * self.residual_bytes + 2 * self._input_bytes(self.residual_bytes // self.element_bytes)
        return norms + wide + self.feed_forward_bytes + self.attention_statistics_bytes

    @property
    def feed_forward_bytes(self) -> int:
        """What the feed-forward part of a layer saves besides its input."""
        d = self.dimensions
        if not d.experts:
            # Both projections in, and their gated product.
            width = d.ffn // self.parallel.tensor
            return self.tokens * 2 * width * self.element_bytes + self._input_bytes(self.tokens * width)
        # The same for every chosen expert, and the copy of the token that was sent to it.
        experts = self.routed_tokens * 2 * d.ffn * self.element_bytes
        experts += self._input_bytes(self.routed_tokens * (d.hidden + d.ffn))
        # The router's logits and weights, and who was chosen.
        return experts + self.tokens // self.parallel.tensor * d.experts * (2 * FLOAT32_BYTES + 1)

    def _input_bytes(self, elements: int) -> int:
        """What a linear layer keeps of an input of so many elements."""
        return int(elements * (self.fp8_bytes or self.element_bytes))

    @property
    def routed_tokens(self) -> int:
        """Tokens that the rank's experts compute, one for each expert that a token has chosen."""
        crowding = EXPERT_CROWDING if self.parallel.expert > 1 else 1.0
        # Under sequence parallelism a rank routes its own part of the tokens.
        return int(crowding * self.tokens * self.dimensions.experts_per_token / self.parallel.tensor)

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
        d = self.dimensions
        gradients = 3 * self.tokens * d.ffn // self.parallel.tensor * self.element_bytes
        if d.experts:
            gradients = self.routed_tokens * (d.hidden + 3 * d.ffn) * self.element_bytes
        # FP8 copies of both projections' gradient: for the gradient of the input, and for that of the weights.
        widest = (
            self.routed_tokens * 2 * d.ffn if d.experts else self.tokens * 2 * d.ffn // self.parallel.tensor
        )
        gradients += int(2 * widest * self.fp8_bytes)
        recomputed = {"full": self.layer_bytes, "selective": self.attention_statistics_bytes, "none": 0}
        return gradients + 2 * self.gathered_bytes + self.ring_bytes + recomputed[recompute]

    def forward_workspace_bytes(self) -> int:
        """Alive at most while one layer runs without gradients."""
        return self.layer_bytes + self.gathered_bytes + self.ring_bytes

    def logit_bytes(self, *, with_gradient: bool) -> int:
        """The last stage's logits in the model's dtype, and their gradient; float32 copies exist of
        LOGIT_CHUNK_TOKENS tokens at a time.

        At all positions: a micro-batch may hold next to nothing but sampled tokens, where the policy does not search.
        """
        width = self.dimensions.padded_vocab(self.parallel.tensor) // self.parallel.tensor
        chunk = min(self.tokens, LOGIT_CHUNK_TOKENS) * LOGIT_CHUNK_COPIES * width * FLOAT32_BYTES
        logits = self.tokens * width * self.element_bytes
        # Beside them the final norm's input and output, and the gathered input of the output layer.
        return (2 if with_gradient else 1) * logits + chunk + 2 * self.residual_bytes + self.gathered_bytes
