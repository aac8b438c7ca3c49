"""Settings of the importance weights that correct for differences between the log-probs of engine and trainer."""

from dataclasses import dataclass
from typing import Literal

from a2tgpo.io.errors import require


@dataclass(frozen=True, kw_only=True)
class CorrectionConfig:
    """Weights w = pi_trainer / pi_engine by which the policy loss is multiplied.

    The weights are needed if the engine computes less precisely than the trainer, for example in FP8.
    """

    kind: Literal["none", "truncate", "mask"] = "none"
    """`none`: no weights. `truncate`: w is at most `upper`. `mask`: w becomes 0 outside [`lower`, `upper`]."""
    level: Literal["token", "turn", "sequence"] = "token"
    """Unit that has one w: the token, the turn, or the sequence. The w of a turn or sequence is the geometric mean
    over its tokens."""
    upper: float = 2.0
    """Largest weight that `truncate` and `mask` allow, >= 1 (IcePop: 5.0)."""
    lower: float = 0.5
    """Smallest weight that `mask` allows, in [0, 1] (IcePop: 0.5)."""

    def __post_init__(self) -> None:
        require(self.upper >= 1, "algorithm.correction.upper", self.upper, ">= 1")
        require(0 <= self.lower <= 1, "algorithm.correction.lower", self.lower, "in [0, 1]")
