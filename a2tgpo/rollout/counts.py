"""Counts that a rank keeps of a step's rollouts, as plain sums."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class RolloutCounts:
    """Sums over the trajectories of one engine. The sums over all engines are the counts of the step."""

    tool_calls: int = 0
    """Number of tool calls that were made, including failed calls."""
    failed_calls: int = 0
    hung_calls: int = 0
    """Number of failed calls that had not returned when their deadline passed."""
    empty_queries: int = 0
    truncated_observations: int = 0
    """Number of observations that were cut because the remaining token budget was smaller."""
    sampled_tokens: int = 0
    known_prefix_tokens: int = 0
    """Number of context tokens of later turns that the engine had already computed in an earlier turn."""
    cached_prefix_tokens: int = 0
    """Number of known prefix tokens that were still in the prefix cache. The others were computed again."""
    scored_tokens: int = 0
    """Number of answer tokens that were scored, over all aliases."""
    score_prompt_tokens: int = 0
    """Number of tokens of all scoring requests, including their prefixes."""
    score_cached_tokens: int = 0
    """Number of tokens of scoring requests that were in the prefix cache."""
    tool_wait_s: float = 0.0
    """Seconds in which the engine generated nothing because all trajectories waited for a tool."""
    outage_s: float = 0.0
    """Seconds in which a tool's service answered no call of this engine."""
    tool_counts: Counter[str] = field(default_factory=Counter)
    """Counts of the tools themselves (see `Toolset.take_counts`)."""
