"""Settings of the training method: advantage, importance ratio, clipping and aggregation."""

import importlib
import pkgutil
from dataclasses import dataclass, field
from typing import Literal

from a2tgpo.config.correction import CorrectionConfig
from a2tgpo.io.errors import one_of, require

METHODS_PACKAGE = "a2tgpo.advantage.methods"
Aggregation = Literal["seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]


def advantage_names() -> list[str]:
    """Return the values that `algorithm.advantage` may have, which are the names of the modules in
    advantage/methods/.

    Does not import these modules.
    """
    package = importlib.import_module(METHODS_PACKAGE)
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """The defaults define A2TGPO; presets in configs/algorithm/ define the methods that it is compared with."""

    advantage: str = "turn_group"
    """Name of a module in advantage/methods/ (docs/methods.md). turn_group: Eq. 6-9. igpo_joint and igpo_separate:
    the gains of all turns are pooled. grpo: only the outcome gives an advantage. gigpo: as in GiGPO."""
    gamma: float = 1.0
    """Factor in [0, 1] by which each further turn is discounted (paper: 1.0)."""
    alpha: float = 1.0
    """Weight of the turns' part of the advantage; the outcome's part has weight 1. The turns' part is the accumulated
    gain (Eq. 9: 1.0; released scripts: 0.3). With gigpo it is the step advantage (omega in GiGPO: 1.0)."""
    rescale: bool = True
    """Divide the accumulated gain by the square root of its number of terms (Eq. 8)."""
    normalize_by_std: bool = True
    """Subtract a group's mean from its values, and then divide them by their standard deviation. false: only subtract
    the mean."""
    ratio: Literal["turn", "sequence", "token"] = "turn"
    """Unit that has one importance ratio: the turn (Eq. 10), the whole sequence, or the single token."""
    clip_low: float = 3e-3
    """epsilon_low of the paper. A ratio below 1 - c * clip_low is clipped to this value; clip_beta defines c."""
    clip_high: float = 4e-3
    """epsilon_high of the paper. A ratio above 1 + c * clip_high is clipped to this value; clip_beta defines c."""
    clip_beta: float = 0.3
    """beta, in [0, 1), of the adaptive clipping factor c = 1 + beta (2 sigmoid(gain) - 1) (Eq. 11). 0: c is always
    1."""
    dual_clip: float = 0.0
    """A token with a negative advantage A has at most the loss dual_clip * |A|. A value > 1 needs ratio=token. 0: no
    such limit."""
    aggregation: Aggregation = "seq-mean-token-mean"
    """Formula that combines the losses of all tokens into one number; see loss.policy_loss."""
    failed_calls: Literal["neutral", "count"] = "neutral"
    """neutral: a turn whose tool call failed has no gain and is left out of its turn group. count: such a turn has a
    gain like any other."""
    kl_coef: float = 0.0
    """Weight of the penalty on the KL divergence from the reference model; 0: no reference model is loaded."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL divergence. Training accepts only k2 and k3, because the expected gradient of k1 is 0."""
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    """Settings of the importance weights that correct for differences between the log-probs of engine and trainer."""

    def __post_init__(self) -> None:
        names = advantage_names()
        require(self.advantage in names, "algorithm.advantage", self.advantage, one_of(names, self.advantage))
        require(0 <= self.gamma <= 1, "algorithm.gamma", self.gamma, "in [0, 1]")
        require(self.alpha >= 0, "algorithm.alpha", self.alpha, ">= 0")
        require(0 < self.clip_low < 1, "algorithm.clip_low", self.clip_low, "in (0, 1)")
        require(self.clip_high > 0, "algorithm.clip_high", self.clip_high, "> 0")
        require(0 <= self.clip_beta < 1, "algorithm.clip_beta", self.clip_beta, "in [0, 1)")
        require(
            self.dual_clip == 0 or (self.dual_clip > 1 and self.ratio == "token"),
            "algorithm.dual_clip",
            self.dual_clip,
            "0, or > 1 with algorithm.ratio=token",
        )
        require(self.kl_coef >= 0, "algorithm.kl_coef", self.kl_coef, ">= 0")
