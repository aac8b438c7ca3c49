"""Draw the turns of a simulated policy from the request's seed alone."""

from __future__ import annotations

import random


def planned_turn(seed: int, *, median: int, longest: int, call_share: float) -> tuple[int, bool]:
    """Return the turn's tokens, log-normal around `median`, at most `longest`, and whether it ends with a search."""
    rng = random.Random(seed)
    length = min(longest, max(4, round(median * rng.lognormvariate(0.0, 0.6))))
    return length, rng.random() < call_share
