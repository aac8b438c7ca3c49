"""Settings of the reward `judge`, which lets a language model judge each answer."""

import math
import re
from dataclasses import dataclass, field

from a2tgpo.config.expand import Expanded
from a2tgpo.io.errors import ConfigError, require
from a2tgpo.io.web_address import is_http_address

LONGEST_WAIT_S = 8.0
"""Longest wait between two attempts, seconds."""


def _scores() -> dict[str, float]:
    return {"correct": 1.0, "incorrect": 0.0}


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """The reward `judge`, which queries a server with OpenAI's chat interface (docs/rewards.md)."""

    url: Expanded = ""
    """Address of the server, needed with the reward `judge`, for example http://127.0.0.1:8000/v1. Requests go to
    `url`/chat/completions."""
    model: str = ""
    """Name of the model, needed with the reward `judge`."""
    prompt_file: Expanded = ""
    """File with the prompt for the judge. It may contain the placeholders {question}, {answers}, {answer}, {response}
    and {record.FIELD}. Empty: a prompt that asks whether the answer is correct."""
    pattern: str = r"\b(correct|incorrect)\b"
    """Regular expression with one group. The group's last match in the reply, in lower case, is the verdict."""
    scores: dict[str, float] = field(default_factory=_scores)
    """Value of each verdict. A verdict that is not listed must be a number, which is then its value."""
    max_tokens: int = 16
    """Maximum number of tokens in a reply. A model that thinks before it replies needs more than the default."""
    timeout_s: float = 30.0
    """Seconds that one request waits for the reply."""
    max_attempts: int = 3
    """Number of attempts to get a verdict. A reply without a verdict is a failed attempt. If all attempts fail, the
    rollout has no reward."""
    max_calls_per_step: int = 0
    """Maximum number of requests that each engine's first rank sends for the rollouts of a step; 0: no limit. Once
    the limit is reached, further rollouts have no reward. Requests of evaluations are neither limited nor counted."""
    token_file: Expanded = ""
    """File with the server's bearer token. Without a file, the environment variable A2TGPO_JUDGE_TOKEN is used, if it
    exists."""
    cache: bool = True
    """Store the replies in the run's folder judge/, so that the run never sends the same request twice."""

    def __post_init__(self) -> None:
        try:
            num_groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ConfigError(
                f"judge.pattern is {self.pattern!r}; allowed: a regular expression ({error})"
            ) from None
        require(num_groups == 1, "judge.pattern", self.pattern, "a regular expression with one group")
        require(
            all(_is_verdict(verdict, value) for verdict, value in self.scores.items()),
            "judge.scores",
            self.scores,
            "texts in lower case, each with a finite number",
        )
        for name in ("max_tokens", "max_attempts"):
            require(getattr(self, name) >= 1, f"judge.{name}", getattr(self, name), ">= 1")
        require(self.max_calls_per_step >= 0, "judge.max_calls_per_step", self.max_calls_per_step, ">= 0")
        require(self.timeout_s > 0, "judge.timeout_s", self.timeout_s, "> 0")
        # `require` is not used here, because its message would show the password.
        if "@" in "".join(self.url.split("/", 3)[2:3]):
            raise ConfigError("judge.url contains a user name or password; use judge.token_file for a token")

    @property
    def longest_call_s(self) -> float:
        """Upper limit, in seconds, of the time until a verdict, including all attempts and waits."""
        return self.max_attempts * (self.timeout_s + LONGEST_WAIT_S)

    def require_server(self, *, timeout_s: float) -> None:
        """Raise `ConfigError` if a setting that the reward `judge` needs is missing, or if `timeout_s` is too short.

        Args:
            timeout_s: value of `reward.timeout_s`.
        """
        is_address = is_http_address(self.url)
        require(is_address, "judge.url", self.url, "an http:// or https:// address, with the reward judge")
        require(bool(self.model), "judge.model", self.model, "the name of a model, with the reward judge")
        require(
            timeout_s >= self.longest_call_s,
            "reward.timeout_s",
            timeout_s,
            f">= judge.max_attempts x (judge.timeout_s + {LONGEST_WAIT_S:g}) ({self.longest_call_s:g}), or a verdict "
            "could be given up before its last attempt",
        )


def _is_verdict(verdict: object, value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(verdict, str) and verdict == verdict.lower() and is_number
