"""Settings of the optimizer, mini-batches and micro-batches."""

from dataclasses import dataclass, field
from typing import Literal

from a2tgpo.io.errors import require


@dataclass(frozen=True, kw_only=True)
class ExtrapolationConfig:
    """GXPO (arXiv 2605.06755): an update makes two probe steps, extrapolates the weights from them, and takes one
    corrective step from there. All three passes use the same mini-batch (docs/methods.md)."""

    horizon: int = 0
    """Number of steps to which the two probe steps are extrapolated, at least 2 (GXPO: 3, 5 or 10). `0`: plain
    updates."""
    alpha: float = 0.5
    """Share of the extrapolated distance that the weights move before the corrective step (GXPO: 0.5)."""
    old_logprobs: Literal["probe", "step"] = "probe"
    """The policy in the denominator of the ratios in the second and third passes. `probe`: the policy that the pass
    itself evaluates, so every ratio is 1 (GXPO). `step`: the policy that played the trajectories, as in the first
    pass. With `step` and a narrow clipping range, these passes give many turns no gradient."""
    window: int = 30
    """A gate can end the extrapolation. The gate compares the gradient norm of a step with the norms of this many
    earlier steps."""
    tau: float = 3.0
    """A step is an outlier if its gradient norm is at least this many standard deviations above the mean of the
    window."""
    patience: int = 3
    """After this many consecutive outliers, the extrapolation ends for the rest of the run."""
    warmup: int = 50
    """Number of steps before the gate's window begins."""

    def __post_init__(self) -> None:
        key = "update.extrapolation."
        require(self.horizon == 0 or self.horizon >= 2, f"{key}horizon", self.horizon, "0, or >= 2")
        require(self.alpha > 0, f"{key}alpha", self.alpha, "> 0")
        require(self.window >= 2, f"{key}window", self.window, ">= 2")
        require(self.tau > 0, f"{key}tau", self.tau, "> 0")
        require(self.patience >= 1, f"{key}patience", self.patience, ">= 1")
        require(self.warmup >= 0, f"{key}warmup", self.warmup, ">= 0")

    @property
    def is_on(self) -> bool:
        return self.horizon > 0


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """Settings of the optimizer steps in one training step (paper, Table 3)."""

    prompts_per_minibatch: int = 8
    """Number of prompts per optimizer step (paper: 8); a divisor of rollout.prompts_per_step."""
    max_microbatch_tokens: int = 16384
    """Maximum number of tokens in one forward pass. A trajectory with more tokens gets its own micro-batch."""
    lr: float = 1e-6
    """Highest learning rate (paper: 1e-6)."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate's decay after the warm-up."""
    warmup_steps: int = 0
    """Number of optimizer steps in which the learning rate rises linearly to lr."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    """Largest global gradient norm. A larger gradient is scaled down to this norm; 0: no scaling."""
    freeze_router: bool = False
    """Leave the routers of a mixture of experts unchanged, so that a token's experts change only if its hidden states
    change. `true` is refused if the model has no experts."""
    router_balance_coef: float = 0.0
    """Weight of a loss that makes the routers of a mixture of experts use all experts evenly within each trajectory
    (docs/parallelism.md). Pre-training uses 1e-4 to 1e-2. `0`: no such loss. Values above 0 are refused if the model
    has no experts, or if the routers are not trained."""
    distributed_optimizer: bool = True
    """Divide the optimizer state over the data-parallel ranks. `false`: every rank stores all of it."""
    offload: bool = True
    """Keep the trainer's state in host memory in every phase that does not need it. `tools/plan.py` prints how much
    host memory this takes. `false`: weights and optimizer state stay on the GPU."""

    extrapolation: ExtrapolationConfig = field(default_factory=ExtrapolationConfig)

    def __post_init__(self) -> None:
        for name in ("prompts_per_minibatch", "max_microbatch_tokens"):
            require(getattr(self, name) >= 1, f"update.{name}", getattr(self, name), ">= 1")
        for name in ("warmup_steps", "weight_decay", "clip_grad"):
            require(getattr(self, name) >= 0, f"update.{name}", getattr(self, name), ">= 0")
        require(self.lr > 0, "update.lr", self.lr, "> 0")
        require(0 <= self.min_lr <= self.lr, "update.min_lr", self.min_lr, "in [0, update.lr]")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, f"update.{name}", getattr(self, name), "in [0, 1)")
        require(self.router_balance_coef >= 0, "update.router_balance_coef", self.router_balance_coef, ">= 0")
        require(
            self.router_balance_coef == 0 or not self.freeze_router,
            "update.router_balance_coef",
            self.router_balance_coef,
            "0 with update.freeze_router=true, since the loss could only move other weights",
        )
        require(self.adam_eps > 0, "update.adam_eps", self.adam_eps, "> 0")
