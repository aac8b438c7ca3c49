"""Advantage, ratio, clipping and aggregation: the method."""

import importlib
import pkgutil
from dataclasses import dataclass, field
from typing import Literal

from a2tgpo.config.correction import CorrectionConfig
from a2tgpo.io.errors import one_of, require

METHODS_PACKAGE = "a2tgpo.advantage.methods"
Aggregation = Literal["seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]


def advantage_names() -> list[str]:
    """Return the choices of `algorithm.advantage`: the modules in advantage/methods/, which are not imported."""
    package = importlib.import_module(METHODS_PACKAGE)
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """A2TGPO by default; presets in configs/algorithm/ set the comparison methods."""

    advantage: str = "turn_group"
    """turn_group (Eq. 6-9), igpo_joint or igpo_separate (pooled gains), grpo (outcome only), gigpo, or another module
    in advantage/methods/ (docs/methods.md)."""
    gamma: float = 1.0
    """Discount over turns, in [0, 1] (paper: 1.0)."""
    alpha: float = 1.0
    """Weight of the turns' part relative to the outcome's: the accumulated gain (Eq. 9: 1.0; released scripts: 0.3),
    or gigpo's step advantage (its omega: 1.0)."""
    rescale: bool = True
    """Divide the accumulated gain by the square root of its number of terms (Eq. 8)."""
    normalize_by_std: bool = True
    """Divide by the group's standard deviation after subtracting its mean."""
    ratio: Literal["turn", "sequence", "token"] = "turn"
    """One importance ratio for each turn (Eq. 10), sequence or token."""
    clip_low: float = 3e-3
    """The paper's epsilon_low: the ratio is clipped from below at 1 - c * clip_low, with c as in clip_beta."""
    clip_high: float = 4e-3
    """The paper's epsilon_high: the ratio is clipped from above at 1 + c * clip_high."""
    clip_beta: float = 0.3
    """beta of the adaptive clip c = 1 + beta (2 sigmoid(gain) - 1) (Eq. 11), in [0, 1); 0: fixed clip."""
    dual_clip: float = 0.0
    """Largest loss of a token with a negative advantage A, as a multiple of |A|; > 1, with ratio=token. 0: none."""
    aggregation: Aggregation = "seq-mean-token-mean"
    """How token losses become one number; see loss.policy_loss."""
    failed_calls: Literal["neutral", "count"] = "neutral"
    """neutral: a turn whose tool call failed has no gain and is left out of its turn group. count: it has one."""
    kl_coef: float = 0.0
    """Weight of the KL penalty to the reference; 0: no reference model is loaded."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Training accepts k2 and k3; the expected gradient of k1 is 0."""
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    """Rollout correction by importance weights."""

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
