"""Counts of a step's rollouts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class RolloutCounts:
    """Sums over the trajectories of one engine."""

    tool_calls: int = 0
    """Number of tool calls, including failed calls."""
    failed_calls: int = 0
    hung_calls: int = 0
    """Number of failed calls that exceeded their deadline."""
    empty_queries: int = 0
    truncated_observations: int = 0
    """Number of observations that were cut because they did not fit into the token budget."""
    sampled_tokens: int = 0
    taken_groups: int = 0
    """Number of groups that the engine took from the queue (see `GroupRollout.play`)."""
    known_prefix_tokens: int = 0
    """Number of context tokens that the engine had already computed in an earlier turn of the same trajectory."""
    cached_prefix_tokens: int = 0
    """Number of tokens among `known_prefix_tokens` that were still in the prefix cache."""
    scored_tokens: int = 0
    """Number of scored answer tokens, over all aliases."""
    score_prompt_tokens: int = 0
    """Number of tokens of all scoring requests, including the prefixes."""
    score_cached_tokens: int = 0
    """Number of tokens of scoring requests that were in the prefix cache."""
    failed_rewards: int = 0
    """Number of trajectories that a reward could not judge."""
    reward_wait_s: float = 0.0
    """Seconds that the rollout waited for rewards after its last trajectory had ended."""
    reward_counts: Counter[str] = field(default_factory=Counter)
    """Counts that the rewards report (see `RewardPool.take_counts`)."""
    tool_wait_s: float = 0.0
    """Seconds in which the engine was idle because all trajectories waited for a tool."""
    outage_s: float = 0.0
    """Seconds for which this engine waited because a tool's service was unavailable."""
    tool_counts: Counter[str] = field(default_factory=Counter)
    """Counts that the tools report (see `Toolset.take_counts`)."""
