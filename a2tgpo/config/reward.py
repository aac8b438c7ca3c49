"""Settings of the rewards, and of the penalty that is added to them."""

import importlib
import math
import pkgutil
import re
from dataclasses import dataclass

from a2tgpo.io.errors import one_of, require
from a2tgpo.io.user_code import is_user_code

REWARDS_PACKAGE = "a2tgpo.reward.methods"
_TAKEN = re.compile(
    r"reward|none|(em|f1)(_format_gated)?|em_\d+_hops|format_ok_rate|tool_calls|num_questions|num_unjudged"
    r"|(mean|pass)_at_\d+(_exact_match|_format_gated)?|standard_error_.*"
)
"""Names of an evaluation's scores. A user's reward function may not have such a name."""


def reward_names() -> list[str]:
    """Return the rewards of this package: the names of the modules in reward/methods/."""
    # The modules are not imported.
    package = importlib.import_module(REWARDS_PACKAGE)
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def reward_label(spec: str) -> str:
    """Return a reward's name in metrics and records: `name` for `path/to/file.py:name`, otherwise `spec`."""
    return spec.rpartition(":")[2] if is_user_code(spec) else spec


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    names: tuple[str, ...] = ("em",)
    """Rewards whose weighted sum is the outcome reward (docs/rewards.md). Each is a module in reward/methods/, or
    your own function or class as path/to/file.py:name. The file runs with the trainer's rights."""
    weights: tuple[float, ...] = ()
    """Weight of each reward, in the order of `names`. Empty: each weight is 1. Weights are not normalised."""
    format_gate: bool = True
    """`true`: a response with a wrong format gets -1 in place of the weighted sum (Eq. 13-15)."""
    num_workers: int = 16
    """Number of rollouts that each engine's first rank scores at the same time."""
    timeout_s: float = 120.0
    """Seconds after which the scoring of a rollout is treated as failed."""
    max_failed_share: float = 0.25
    """Largest share of a step's rollouts that may have no reward because a reward failed. The step does not train on
    these rollouts. If a larger share has no reward, the run ends."""
    overlong_buffer_tokens: int = 0
    """DAPO's soft overlong penalty begins this many tokens before rollout.max_response_tokens, and grows linearly.
    `0`: no penalty."""
    overlong_penalty: float = 1.0
    """Penalty for a response with rollout.max_response_tokens tokens."""

    def __post_init__(self) -> None:
        known = reward_names()
        for name in self.names:
            is_known = is_user_code(name) or name in known
            rule = f"a list of {one_of(known, name)} | path/to/file.py:name"
            require(is_known, "reward.names", list(self.names), rule)
        are_distinct = len(set(self.labels)) == len(self.names) > 0
        require(
            are_distinct, "reward.names", list(self.names), "at least one reward, each with a name of its own"
        )
        for label in map(reward_label, filter(is_user_code, self.names)):
            is_free = _TAKEN.fullmatch(label) is None
            require(is_free, "reward.names", list(self.names), f"a function with another name than {label}")
        weights = list(self.weights)
        fits = len(weights) in (0, len(self.names)) and all(map(math.isfinite, weights))
        require(fits, "reward.weights", weights, f"[], or one finite number for each of {list(self.names)}")
        require(self.num_workers >= 1, "reward.num_workers", self.num_workers, ">= 1")
        require(self.timeout_s > 0, "reward.timeout_s", self.timeout_s, "> 0")
        is_share = 0 <= self.max_failed_share <= 1
        require(is_share, "reward.max_failed_share", self.max_failed_share, "in [0, 1]")
        is_length = self.overlong_buffer_tokens >= 0
        require(is_length, "reward.overlong_buffer_tokens", self.overlong_buffer_tokens, ">= 0")
        require(self.overlong_penalty >= 0, "reward.overlong_penalty", self.overlong_penalty, ">= 0")

    @property
    def labels(self) -> tuple[str, ...]:
        """The name of each reward in metrics and records."""
        return tuple(map(reward_label, self.names))
