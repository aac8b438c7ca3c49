"""Information gain of a turn: by how much the turn increased the gold answer's probability (Eq. 2-3)."""

import itertools
import math
from collections.abc import Sequence


def mean_logprob(answer_logprobs: Sequence[float]) -> float | None:
    """Return the mean of an answer's token log-probs, in nats; None if there are none or the mean is not finite."""
    if not answer_logprobs:
        return None
    mean = math.fsum(answer_logprobs) / len(answer_logprobs)
    return mean if math.isfinite(mean) else None


def answer_logprob(aliases: Sequence[Sequence[float]]) -> float | None:
    """Return the largest `mean_logprob` over the aliases; None if any alias could not be scored.

    The maximum must be over the same aliases after every turn; otherwise a missing alias could change the gain.
    """
    means = [mean_logprob(logprobs) for logprobs in aliases]
    return max((m for m in means if m is not None), default=None) if None not in means else None


def answer_probability(logprob: float | None) -> float | None:
    """Return the gold answer's probability P_t = exp(mean_j log pi(a_j | c_t, scaffold, a_<j)).

    `logprob` is the mean over j. If `logprob` is None, return None.
    """
    return None if logprob is None else math.exp(logprob)


def info_gains(logprobs: Sequence[float | None], *, measure: str = "probability") -> list[float | None]:
    """Return the gains ig_t of the turns t = 1..n, given the gold answer's mean log-prob in each context c_0..c_n.

    Args:
        logprobs: n + 1 values, in nats; None for each context that could not be scored.
        measure: "probability": a gain is a difference of P (Eq. 3); "log_probability": a gain is a difference of log
            P.

    Returns:
        n gains. The gain ig_t is None if the value for c_{t-1} or c_t is None; other gains keep their positions.
    """
    values = [answer_probability(p) for p in logprobs] if measure == "probability" else list(logprobs)
    return [
        None if before is None or after is None else after - before
        for before, after in itertools.pairwise(values)
    ]
