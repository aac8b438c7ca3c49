"""Additions to the outcome reward."""

from dataclasses import dataclass

from a2tgpo.io.errors import require


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    overlong_buffer_tokens: int = 0
    """DAPO's soft overlong penalty: it grows over the last so many tokens of rollout.max_response_tokens; 0: none."""
    overlong_penalty: float = 1.0
    """What a response of full length loses."""

    def __post_init__(self) -> None:
        require(
            self.overlong_buffer_tokens >= 0,
            "reward.overlong_buffer_tokens",
            self.overlong_buffer_tokens,
            ">= 0",
        )
        require(self.overlong_penalty >= 0, "reward.overlong_penalty", self.overlong_penalty, ">= 0")
