"""The optimizer, and the division of a step's trajectories into updates."""

from dataclasses import dataclass

from a2tgpo.io.errors import require


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """Optimisation of one step (paper, Table 3)."""

    prompts_per_minibatch: int = 8
    """Prompts per optimizer step; must divide rollout.prompts_per_step (paper: 8)."""
    max_microbatch_tokens: int = 16384
    """Tokens packed into one forward pass; a longer trajectory gets a micro-batch of its own."""
    lr: float = 1e-6
    """Peak learning rate (paper: 1e-6)."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_schedule: str = "constant"
    """constant | linear | cosine, after the warm-up."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0: never."""
    distributed_optimizer: bool = True
    """Shard optimizer state over the data-parallel ranks."""
    offload: bool = True
    """Move what a phase does not need off the card: all of the trainer for the rollout. Weights and optimizer state
    then have a place in host memory (`tools/plan.py` says how much); without it they stay on the card."""

    def __post_init__(self) -> None:
        require(
            self.prompts_per_minibatch >= 1,
            "update.prompts_per_minibatch",
            self.prompts_per_minibatch,
            ">= 1",
        )
        require(
            self.max_microbatch_tokens >= 1,
            "update.max_microbatch_tokens",
            self.max_microbatch_tokens,
            ">= 1",
        )
        require(self.lr > 0, "update.lr", self.lr, "> 0")
        require(0 <= self.min_lr <= self.lr, "update.min_lr", self.min_lr, "in [0, update.lr]")
        require(
            self.lr_schedule in ("constant", "linear", "cosine"),
            "update.lr_schedule",
            self.lr_schedule,
            "constant | linear | cosine",
        )
        require(self.warmup_steps >= 0, "update.warmup_steps", self.warmup_steps, ">= 0")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, f"update.{name}", getattr(self, name), "in [0, 1)")
        require(self.adam_eps > 0, "update.adam_eps", self.adam_eps, "> 0")
        require(self.weight_decay >= 0, "update.weight_decay", self.weight_decay, ">= 0")
        require(self.clip_grad >= 0, "update.clip_grad", self.clip_grad, ">= 0")
