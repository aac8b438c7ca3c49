"""Importance weights for rollouts of an engine whose log-probs differ from the trainer's."""

from dataclasses import dataclass
from typing import Literal

from a2tgpo.io.errors import require


@dataclass(frozen=True, kw_only=True)
class CorrectionConfig:
    """Weights w = pi_trainer / pi_engine on the policy loss; needed if the engine is less precise (FP8).

    See loss.rollout_correction for sources.
    """

    kind: Literal["none", "truncate", "mask"] = "none"
    """truncate: w is at most `upper`. mask: w is 0 outside [`lower`, `upper`]."""
    level: Literal["token", "turn", "sequence"] = "token"
    """One w for each token (both sources), turn or sequence; the latter two are geometric means over their tokens."""
    upper: float = 2.0
    """Largest weight, >= 1 (IcePop: 5.0)."""
    lower: float = 0.5
    """Smallest weight that `mask` keeps, in [0, 1] (IcePop: 0.5)."""

    def __post_init__(self) -> None:
        require(self.upper >= 1, "algorithm.correction.upper", self.upper, ">= 1")
        require(0 <= self.lower <= 1, "algorithm.correction.lower", self.lower, "in [0, 1]")
