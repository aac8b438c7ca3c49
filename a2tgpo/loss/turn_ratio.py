"""The importance ratio of a token, of a turn (Eq. 10) or of a sequence."""

import torch

MAX_LOG_RATIO = 10.0


def segment_mean(values: torch.Tensor, segment_ids: torch.Tensor, num_segments: int) -> torch.Tensor:
    """Return the mean of `values` [n] over each segment, [num_segments]. The mean of an empty segment is 0."""
    total = values.new_zeros(num_segments).index_add(0, segment_ids, values)
    count = values.new_zeros(num_segments).index_add(0, segment_ids, torch.ones_like(values))
    return total / count.clamp(min=1)


def shared_log_ratio(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, segment_ids: torch.Tensor | None, num_segments: int
) -> torch.Tensor:
    """Return log s of each token: the mean of log pi - log pi_old over the token's segment, clamped to at most 10.

    Args:
        logprobs: [n] with gradient. If a segment has L tokens, each of them gets 1/L of the ratio's gradient.
        old_logprobs: [n].
        segment_ids: [n] int64 turn or sequence of each token. None: every token is its own segment.
    """
    log_ratio = logprobs - old_logprobs
    if segment_ids is not None:
        log_ratio = segment_mean(log_ratio, segment_ids, num_segments)[segment_ids]
    return log_ratio.clamp(max=MAX_LOG_RATIO)
