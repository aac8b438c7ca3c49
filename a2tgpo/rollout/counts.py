"""Counts of a step's rollouts, as plain sums on this rank."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class RolloutCounts:
    """Sums over the trajectories of this engine; add them over the engines for the step."""

    tool_calls: int = 0
    """Calls made, including failed ones."""
    failed_calls: int = 0
    hung_calls: int = 0
    """Failed calls that had not returned at their deadline."""
    empty_queries: int = 0
    truncated_observations: int = 0
    """Observations cut to the remaining token budget."""
    sampled_tokens: int = 0
    known_prefix_tokens: int = 0
    """Context tokens of later turns that the engine had computed before."""
    cached_prefix_tokens: int = 0
    """Known prefix tokens found in the prefix cache; the others were computed again."""
    scored_tokens: int = 0
    """Answer tokens scored, over all aliases."""
    score_prompt_tokens: int = 0
    """Tokens of all scoring requests, including prefixes."""
    score_cached_tokens: int = 0
    """Tokens of scoring requests found in the prefix cache."""
    tool_wait_s: float = 0.0
    """Time without generation because all trajectories waited for a tool, seconds."""
    outage_s: float = 0.0
    """Time in which a tool's service answered none of this engine's calls, seconds."""
    tool_counts: Counter[str] = field(default_factory=Counter)
    """See `Toolset.take_counts`."""
