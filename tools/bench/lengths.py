"""Draw a simulated policy's turns. The request's seed alone determines a turn."""

from __future__ import annotations

import random


def planned_turn(seed: int, *, median: int, longest: int, call_share: float) -> tuple[int, bool]:
    """Return a turn's number of tokens, and whether the turn ends with a search.

    The number of tokens is log-normal with median `median`, and at most `longest`. A turn ends with a search with
    probability `call_share`.
    """
    rng = random.Random(seed)
    length = min(longest, max(4, round(median * rng.lognormvariate(0.0, 0.6))))
    return length, rng.random() < call_share
