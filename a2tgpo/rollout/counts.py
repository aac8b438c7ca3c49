"""What happened during one call of a rollout, as plain sums of this rank."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class RolloutCounts:
    """Sums over the trajectories that this engine replica played; add them over replicas for the step."""

    trajectories: int = 0
    turns: int = 0
    tool_calls: int = 0
    """Calls made, failed ones included."""
    failed_calls: int = 0
    hung_calls: int = 0
    """Failed calls that had not returned at their deadline."""
    empty_queries: int = 0
    truncated_observations: int = 0
    """Observations cut to the tokens left."""
    sampled_tokens: int = 0
    observation_tokens: int = 0
    known_prefix_tokens: int = 0
    """Tokens that stood in the context of a turn after the first and had been in the engine before."""
    cached_prefix_tokens: int = 0
    """Those of them that were taken from the prefix cache; the others were computed again."""
    scored_contexts: int = 0
    """Contexts (prompts and process turns) that the gold answer was to be scored in."""
    missing_scores: int = 0
    """Those of them without room for the answer, hence without a gain."""
    scored_tokens: int = 0
    """Answer tokens scored, over all aliases."""
    score_prompt_tokens: int = 0
    """Tokens of all scoring requests, prefixes included."""
    score_cached_tokens: int = 0
    """Those of them taken from the prefix cache."""
    engine_steps: int = 0
    tool_wait_s: float = 0.0
    """Time in which nothing could be generated because all trajectories waited for the tool, seconds."""
    outage_s: float = 0.0
    """Time in which a tool's service answered none of this engine's calls, seconds."""
    wall_s: float = 0.0
    stop_reasons: Counter[str] = field(default_factory=Counter)

    def add(self, other: RolloutCounts) -> None:
        """Add what a further call counted."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def to_metrics(self) -> dict[str, float]:
        """The sums by metric name."""
        values = {name: float(value) for name, value in vars(self).items() if name != "stop_reasons"}
        return values | {f"stop/{reason}": float(n) for reason, n in sorted(self.stop_reasons.items())}
