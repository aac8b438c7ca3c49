"""The optimizer, and the division of a step's trajectories into updates."""

from dataclasses import dataclass
from typing import Literal

from a2tgpo.io.errors import require


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """Optimisation of one step (paper, Table 3)."""

    prompts_per_minibatch: int = 8
    """Prompts per optimizer step; must divide rollout.prompts_per_step (paper: 8)."""
    max_microbatch_tokens: int = 16384
    """Most tokens packed into one forward pass; a longer trajectory gets its own micro-batch."""
    lr: float = 1e-6
    """Peak learning rate (paper: 1e-6)."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay of the learning rate after the warm-up."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    """Global gradient norm to which larger gradients are scaled down; 0: no scaling."""
    distributed_optimizer: bool = True
    """Shard optimizer state over the data-parallel ranks."""
    offload: bool = True
    """Move what a phase does not need from the GPU to host memory; during the rollout the whole trainer.
    `tools/plan.py` prints how much host memory this takes. false: weights and optimizer state stay on the GPU."""

    def __post_init__(self) -> None:
        for name in ("prompts_per_minibatch", "max_microbatch_tokens"):
            require(getattr(self, name) >= 1, f"update.{name}", getattr(self, name), ">= 1")
        for name in ("warmup_steps", "weight_decay", "clip_grad"):
            require(getattr(self, name) >= 0, f"update.{name}", getattr(self, name), ">= 0")
        require(self.lr > 0, "update.lr", self.lr, "> 0")
        require(0 <= self.min_lr <= self.lr, "update.min_lr", self.min_lr, "in [0, update.lr]")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, f"update.{name}", getattr(self, name), "in [0, 1)")
        require(self.adam_eps > 0, "update.adam_eps", self.adam_eps, "> 0")
