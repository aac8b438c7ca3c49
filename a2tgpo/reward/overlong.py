"""DAPO's soft overlong penalty for responses near the token limit."""


def overlong_penalty(num_tokens: int, *, max_tokens: int, buffer_tokens: int, penalty: float) -> float:
    """Return the penalty to add to a response's outcome reward (DAPO, arXiv 2503.14476, Eq. 13).

    The result is 0 up to `max_tokens` - `buffer_tokens` tokens, falls linearly to -`penalty` at `max_tokens` tokens,
    and stays there for longer responses.

    Args:
        num_tokens: number of sampled tokens and observation tokens in the response.
        max_tokens: value of `rollout.max_response_tokens`.
        buffer_tokens: number of tokens over which the penalty grows (L_cache). 0: no response gets a penalty.
        penalty: the largest penalty, >= 0. The paper uses 1.
    """
    if buffer_tokens == 0:
        return 0.0
    excess = num_tokens - (max_tokens - buffer_tokens)
    return -penalty * min(max(excess, 0) / buffer_tokens, 1.0)
