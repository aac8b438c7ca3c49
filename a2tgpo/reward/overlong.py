"""DAPO's soft overlong penalty: a response near its token limit gradually loses reward."""


def overlong_penalty(num_tokens: int, *, max_tokens: int, buffer_tokens: int, penalty: float) -> float:
    """Return the penalty to add to a response's outcome reward (DAPO, arXiv 2503.14476, Eq. 13).

    0 up to `max_tokens` - `buffer_tokens`, then falling linearly to -`penalty` at `max_tokens`, and -`penalty`
    beyond.

    Args:
        num_tokens: the response's sampled and observation tokens, counted as for `max_tokens`.
        max_tokens: `rollout.max_response_tokens`.
        buffer_tokens: L_cache; 0: no penalty at any length.
        penalty: for a response of full length, >= 0; 1 in the paper.
    """
    if buffer_tokens == 0:
        return 0.0
    excess = num_tokens - (max_tokens - buffer_tokens)
    return -penalty * min(max(excess, 0) / buffer_tokens, 1.0)
