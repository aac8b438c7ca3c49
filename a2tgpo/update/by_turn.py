"""Sum values of tokens by the index of their turn."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_TURNS_SHOWN = 64
"""Number of turns with sums of their own. The last sum also contains all later turns."""


def sums_by_turn(turn_index: Tensor, values: Tensor) -> Tensor:
    """Return the sum of the values at each turn index, [MAX_TURNS_SHOWN] float64.

    Args:
        turn_index: [n] int64: the index of each token's turn in its trajectory.
        values: [n].
    """
    zeros = torch.zeros(MAX_TURNS_SHOWN, dtype=torch.float64, device=turn_index.device)
    return zeros.index_add_(0, turn_index.clamp(max=MAX_TURNS_SHOWN - 1), values.double())
