"""Floating-point operations of the model, a multiplication and an addition counted as two."""

from __future__ import annotations

from dataclasses import dataclass

from a2tgpo.plan.dimensions import ModelDimensions


@dataclass(frozen=True)
class TokenFlops:
    """Of one token's forward pass; a backward pass takes twice as many."""

    layers: float
    """All layers."""
    output: float
    """The output layer."""

    @property
    def total(self) -> float:
        return self.layers + self.output


def forward_flops(dimensions: ModelDimensions, *, context: float) -> TokenFlops:
    """A token's forward pass while it attends to `context` tokens (on average half its sequence)."""
    d = dimensions
    matrices = d.hidden * (2 * d.query_width + 2 * d.kv_width) + 3 * d.hidden * d.ffn
    attention = 4 * d.query_width * context
    return TokenFlops(layers=d.layers * (2 * matrices + attention), output=2 * d.hidden * d.vocab)
