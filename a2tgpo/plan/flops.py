"""Floating-point operations of the model. A multiplication followed by an addition counts as two operations."""

from __future__ import annotations

from dataclasses import dataclass

from a2tgpo.plan.dimensions import ModelDimensions


@dataclass(frozen=True)
class TokenFlops:
    """Operations of one token's forward pass. A backward pass takes twice as many."""

    linear: float
    """Operations of the decoder's linear layers, without the experts."""
    attention: float
    experts: float
    """Operations of the experts that the router chose for the token, over all layers; 0 in a dense model."""
    output: float
    """Operations of the output layer, averaged over all tokens."""

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.experts + self.output


def forward_flops(dimensions: ModelDimensions, *, context: float, output_share: float = 1.0) -> TokenFlops:
    """Return the operations of one token's forward pass.

    Args:
        context: number of tokens that the token attends to. The mean is half the length of the sequence.
        output_share: share of the tokens at which the output layer runs.
    """
    d = dimensions
    matrices = d.hidden * (2 * d.query_width + 2 * d.kv_width)
    feed_forward = 3 * d.hidden * d.ffn
    attention = 4 * d.query_width * context
    experts = 0.0
    if d.experts:
        matrices += d.experts * d.hidden  # the router
        experts = 2.0 * d.layers * d.experts_per_token * feed_forward
    else:
        matrices += feed_forward
    return TokenFlops(
        linear=d.layers * 2 * matrices,
        attention=d.layers * attention,
        experts=experts,
        output=output_share * 2 * d.hidden * d.vocab,
    )
