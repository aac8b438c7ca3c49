"""Settings of the training method: advantage, importance ratio, clipping and aggregation."""

from dataclasses import dataclass, field
from typing import Literal

from a2tgpo.config.contrast import ContrastConfig
from a2tgpo.config.correction import CorrectionConfig
from a2tgpo.config.expand import Expanded
from a2tgpo.config.future import FutureConfig
from a2tgpo.config.method_part import ADVANTAGE, NO_CREDIT, OBJECTIVE, TOKEN_CREDIT, MethodPart
from a2tgpo.io.errors import require

OF_TREES = ("at2po", "tree_grpo")
"""Methods of advantage/methods/ that compare the branches of a tree (`rollout.tree`)."""
OF_INNER_BRANCHES = ("appo",)
"""Methods of advantage/methods/ that use the outcomes of inner branches (`rollout.inner_branches`)."""
WITHOUT_TURN_GROUPS = (
    *("appo", "gigpo", "grpo", "gtpo", "hgpo", "igpo_joint", "igpo_separate"),
    *OF_TREES,
)
"""Methods of advantage/methods/ that do not normalise within turn groups."""
WITH_CONTRAST = ("gcpo",)
"""Token credits of loss/credits/ that read log-probs after contrast prompts."""
WITHOUT_CLIPPING_RANGE = ("sapo",)
"""Objectives of loss/objectives/ that do not use clip_low and clip_high."""
Aggregation = Literal["seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """Settings of the training method. The defaults define A2TGPO; configs/algorithm/ has other methods."""

    advantage: Expanded = "turn_group"
    """Name of a module in advantage/methods/ (docs/methods.md), or your own function as path/to/file.py:name.
    `turn_group` is Eq. 6-9. `turn_group_absent` also counts turns that a trajectory did not take, with gain 0.
    `igpo_joint` normalises gains and outcomes together, `igpo_separate` separately. `grpo` uses only the outcome.
    `gigpo`, `hgpo`, `gtpo` and `mt_grpo` are the advantages of GiGPO, HGPO, GTPO and MT-GRPO. `at2po` and `tree_grpo`
    are those of AT2PO and Tree-GRPO, and need rollout.tree. `appo` is that of APPO, and needs
    rollout.inner_branches."""
    objective: Expanded = "clipped_ratio"
    """Policy loss: name of a module in loss/objectives/ (docs/methods.md), or your own function as
    path/to/file.py:name. `clipped_ratio` is Eq. 12. `cispo`, `sapo` and `gmpo` are the losses of CISPO, SAPO and
    GMPO. `gspo_token` is GSPO's variant for tokens that share a ratio but have different advantages."""
    token_credit: Expanded = NO_CREDIT
    """How the advantage of a turn is divided over its tokens: name of a module in loss/credits/ (docs/methods.md), or
    your own function as path/to/file.py:name. `none`: every token of a turn has the turn's advantage. `gcpo`: tokens
    that depend more on the instructions get a larger share (algorithm.contrast). `gcpo` needs one more forward pass.
    `appo` multiplies the advantage of a token by a factor, which is larger if updates have made the tokens after it
    more probable (algorithm.future)."""
    gamma: float = 1.0
    """Discount factor per turn, in [0, 1] (paper: 1.0)."""
    alpha: float = 1.0
    """Weight of the accumulated gain, relative to a weight of 1 for the outcome (Eq. 9: 1.0; released scripts: 0.3).
    For gigpo, this is the weight of the step advantage (GiGPO's omega: 1.0). For gtpo and mt_grpo, it is the weight
    of turn rewards. For hgpo, it is the exponent of the weights of long histories (HGPO: 1.0)."""
    rescale: bool = True
    """Divide the accumulated gain by the square root of its number of terms (Eq. 8)."""
    normalize_by_std: bool = True
    """`true`: normalise a group's values to mean 0 and standard deviation 1. `false`: only subtract the mean."""
    gain_spread_floor: float = 0.0
    """The gains of a turn group are divided by their standard deviation, or by this number if the standard
    deviation is smaller. Raise this floor if advantage/narrow_signal_share is large (docs/methods.md)."""
    hgpo_history: int = 2
    """For hgpo: HGPO compares histories of different lengths. This is the number of states before the current state
    in the longest histories (HGPO: 2 or 4)."""
    ratio: Literal["turn", "sequence", "token"] = "turn"
    """Unit that has one importance ratio: the turn (Eq. 10), the whole sequence, or the token."""
    clip_low: float = 3e-3
    """epsilon_low of the paper. A ratio is clipped to at least 1 - c * clip_low, where clip_beta defines c. If
    clip_low is 1 and clip_beta is 0, there is no lower limit."""
    clip_high: float = 4e-3
    """epsilon_high of the paper. A ratio is clipped to at most 1 + c * clip_high, where clip_beta defines c."""
    clip_beta: float = 0.3
    """beta, in [0, 1), of the clipping factor c = 1 + beta (2 sigmoid(gain) - 1) (Eq. 11). If beta is 0, c is 1."""
    dual_clip: float = 0.0
    """Largest loss of a token with a negative advantage A, in units of |A|. A value > 1 needs ratio=token and
    objective=clipped_ratio. `0`: no limit."""
    sapo_tau_positive: float = 1.0
    """For objective=sapo: temperature of the gate for tokens with a positive advantage (SAPO: 1.0). With a higher
    temperature, the gradient falls faster as the ratio moves away from 1."""
    sapo_tau_negative: float = 1.05
    """For objective=sapo: temperature of the gate for the other tokens (SAPO: 1.05)."""
    aggregation: Aggregation = "seq-mean-token-mean"
    """How the losses of all tokens become one number; see loss.policy_loss."""
    turn_signal: Literal["gain", "scores"] = "gain"
    """Value of a turn with tool calls. `gain`: its information gain. `scores`: the score that a reward or a tool gave
    the turn (docs/rewards.md). Questions then need no gold answers, and a turn without a score is neutral."""
    failed_calls: Literal["neutral", "count"] = "neutral"
    """`neutral`: a turn with a failed tool call has no gain and no place in its turn group. `count`: the turn is
    treated like any other turn."""
    kl_coef: float = 0.0
    """Weight of the KL divergence from the reference model; 0: no KL term."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL divergence. Training refuses k1, because the expected gradient of k1 is 0."""
    entropy_coef: float = 0.0
    """Weight of the policy's entropy, which is subtracted from the loss; 0: no entropy term. With entropy_target,
    this is the largest weight."""
    entropy_target: float = 0.0
    """Entropy in nats per token below which the entropy term is switched on (Skywork-OR1: 0.2, with entropy_coef
    0.005). `0`: the weight is always entropy_coef."""
    entropy_delta: float = 1e-4
    """With entropy_target, the weight of the entropy starts at 0. Each step raises the weight by this number if the
    entropy is below the target, and otherwise lowers it."""
    clip_cov_share: float = 0.0
    """Share of the sampled tokens that get no gradient because they lower the entropy (Clip-Cov: 2e-4); 0: none."""
    clip_cov_low: float = 1.0
    """Smallest covariance of log-prob and advantage at which a token may lose its gradient (Clip-Cov: 1)."""
    clip_cov_high: float = 5.0
    """Largest covariance of log-prob and advantage at which a token may lose its gradient (Clip-Cov: 5)."""
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    """Importance weights that correct for differences between the log-probs of engine and trainer."""
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    """Contrast prompts, for token credits that compare log-probs after two prompts."""
    future: FutureConfig = field(default_factory=FutureConfig)
    """Settings of APPO's token credit."""

    @property
    def uses_gain(self) -> bool:
        """Whether the value of a turn is its information gain, which requires scoring the gold answers."""
        return self.turn_signal == "gain"

    @property
    def has_clipping_range(self) -> bool:
        """Whether the objective clips ratios to the range from 1 - clip_low to 1 + clip_high."""
        return self.objective not in WITHOUT_CLIPPING_RANGE

    def __post_init__(self) -> None:
        ADVANTAGE.require_known(self.advantage)
        OBJECTIVE.require_known(self.objective)
        TOKEN_CREDIT.require_known(self.token_credit, NO_CREDIT)
        require(0 <= self.gamma <= 1, "algorithm.gamma", self.gamma, "in [0, 1]")
        require(self.alpha >= 0, "algorithm.alpha", self.alpha, ">= 0")
        require(self.hgpo_history >= 0, "algorithm.hgpo_history", self.hgpo_history, ">= 0")
        require(self.gain_spread_floor >= 0, "algorithm.gain_spread_floor", self.gain_spread_floor, ">= 0")
        require(
            self.gain_spread_floor == 0
            or (self.normalize_by_std and self.advantage not in WITHOUT_TURN_GROUPS),
            "algorithm.gain_spread_floor",
            self.gain_spread_floor,
            f"0 with algorithm.advantage={self.advantage} and algorithm.normalize_by_std="
            f"{str(self.normalize_by_std).lower()}, which divide by no spread of a turn group",
        )
        require(0 < self.clip_low <= 1, "algorithm.clip_low", self.clip_low, "in (0, 1]")
        require(self.clip_high > 0, "algorithm.clip_high", self.clip_high, "> 0")
        require(0 <= self.clip_beta < 1, "algorithm.clip_beta", self.clip_beta, "in [0, 1)")
        require(
            self.dual_clip == 0
            or (self.dual_clip > 1 and (self.ratio, self.objective) == ("token", "clipped_ratio")),
            "algorithm.dual_clip",
            self.dual_clip,
            "0, or > 1 with algorithm.ratio=token and algorithm.objective=clipped_ratio",
        )
        for name in ("sapo_tau_positive", "sapo_tau_negative"):
            require(getattr(self, name) > 0, f"algorithm.{name}", getattr(self, name), "> 0")
        for name in ("kl_coef", "entropy_coef", "entropy_target"):
            require(getattr(self, name) >= 0, f"algorithm.{name}", getattr(self, name), ">= 0")
        require(
            self.entropy_target == 0 or self.entropy_coef > 0,
            "algorithm.entropy_target",
            self.entropy_target,
            "0 with algorithm.entropy_coef 0, which is the largest weight of the entropy; "
            "set algorithm.entropy_coef=0.005",
        )
        require(0 <= self.clip_cov_share < 1, "algorithm.clip_cov_share", self.clip_cov_share, "in [0, 1)")
        require(
            0 < self.clip_cov_low < self.clip_cov_high,
            "algorithm.clip_cov_low",
            self.clip_cov_low,
            f"> 0 and below algorithm.clip_cov_high ({self.clip_cov_high:g})",
        )
        require(self.entropy_delta > 0, "algorithm.entropy_delta", self.entropy_delta, "> 0")

    @property
    def parts(self) -> tuple[tuple[MethodPart, str], ...]:
        """The parts of the method that a setting chooses, each with the value of its setting."""
        parts = ((ADVANTAGE, self.advantage), (OBJECTIVE, self.objective), (TOKEN_CREDIT, self.token_credit))
        return tuple((part, spec) for part, spec in parts if spec != NO_CREDIT)
