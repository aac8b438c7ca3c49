"""Settings of the penalty that is added to the outcome reward."""

from dataclasses import dataclass

from a2tgpo.io.errors import require


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    overlong_buffer_tokens: int = 0
    """DAPO's soft overlong penalty begins this many tokens before rollout.max_response_tokens, and grows linearly. 0:
    no penalty."""
    overlong_penalty: float = 1.0
    """Penalty of a response with rollout.max_response_tokens tokens."""

    def __post_init__(self) -> None:
        require(
            self.overlong_buffer_tokens >= 0,
            "reward.overlong_buffer_tokens",
            self.overlong_buffer_tokens,
            ">= 0",
        )
        require(self.overlong_penalty >= 0, "reward.overlong_penalty", self.overlong_penalty, ">= 0")
