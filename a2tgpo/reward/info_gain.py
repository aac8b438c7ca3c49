"""Information gain of a turn: the increase of the gold answer's probability (Eq. 2-3)."""

import itertools
import math
from collections.abc import Sequence

from a2tgpo.trajectory import Trajectory


def mean_logprob(answer_logprobs: Sequence[float]) -> float | None:
    """Return the mean of an answer's token log-probs, in nats, or None if there is no finite mean."""
    if not answer_logprobs:
        return None
    mean = math.fsum(answer_logprobs) / len(answer_logprobs)
    return mean if math.isfinite(mean) else None


def answer_logprob(aliases: Sequence[Sequence[float]]) -> float | None:
    """Return the largest `mean_logprob` over the aliases, or None if any alias lacks a score.

    If an alias had a score in only one of two contexts, the difference of the two maxima would not be a gain.
    """
    means = [mean_logprob(logprobs) for logprobs in aliases]
    return max((m for m in means if m is not None), default=None) if None not in means else None


def answer_probability(logprob: float | None) -> float | None:
    """Return the gold answer's probability P_t = exp(mean_j log pi(a_j | c_t, scaffold, a_<j)).

    `logprob` is the mean over the answer's tokens j. If `logprob` is None, return None.
    """
    return None if logprob is None else math.exp(logprob)


def info_gains(logprobs: Sequence[float | None], *, measure: str = "probability") -> list[float | None]:
    """Return the gain ig_t of each turn t = 1..n, or None if c_{t-1} or c_t has no score.

    Args:
        logprobs: n + 1 values, the gold answer's mean log-prob in each context c_0..c_n, in nats. None: no score.
        measure: the value whose differences are the gains: "probability" (P, Eq. 3) or "log_probability" (log P).
    """
    values = [answer_probability(p) for p in logprobs] if measure == "probability" else list(logprobs)
    return [
        None if before is None or after is None else after - before
        for before, after in itertools.pairwise(values)
    ]


def set_gains(
    trajectory: Trajectory, context_logprobs: Sequence[list[list[float]] | None], *, measure: str
) -> None:
    """Set the gold answer's probability in every context of `trajectory`, and the gain of every turn with tool calls.

    Args:
        context_logprobs: for each context c_0..c_n, the log-probs of each alias and token, in nats. None: no score.
        measure: as for `info_gains`.
    """
    logprobs = [None if aliases is None else answer_logprob(aliases) for aliases in context_logprobs]
    trajectory.baseline_prob = answer_probability(logprobs[0])
    gains = info_gains(logprobs, measure=measure)
    for turn, logprob, gain in zip(trajectory.process_turns, logprobs[1:], gains, strict=True):
        turn.answer_prob = answer_probability(logprob)
        turn.info_gain = gain
