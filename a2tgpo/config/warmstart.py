"""Supervised warm start on demonstrations (launch/warmstart.py)."""

from dataclasses import dataclass

from a2tgpo.config.expand import Expanded
from a2tgpo.io.errors import require


@dataclass(frozen=True, kw_only=True)
class WarmstartConfig:
    source: Expanded = ""
    """Hugging Face folder of the model to start from; the warm-started model is written to model.path."""
    demonstrations: Expanded = ""
    """JSONL of demonstrations (docs/warmstart.md)."""
    steps: int = 200
    """Optimizer steps."""
    batch_size: int = 64
    """Demonstrations per optimizer step over all ranks."""
    lr: float = 0.0
    """Peak learning rate; linear warm-up over a tenth of the steps, cosine decay to a tenth of the peak. 0: chosen by
    the model's size, 1e-5 x sqrt(8e9 / parameters), at most 1e-3."""
    weight_decay: float = 0.01
    observation_weight: float = 0.0
    """Weight of prompt and observation tokens in the loss; the policy's own tokens have weight 1. It helps an
    untrained model learn to copy; use 0 for pre-trained models."""
    fp8: bool = False
    """Compute in FP8 as `model.fp8` sets it; false: compute in model.dtype despite `model.fp8`."""
    held_out: float = 0.02
    """Share of the questions whose demonstrations are held out of training and give `warmstart/held_out_loss`."""
    evaluate_every: int = 50
    """Steps between held-out losses; 0: only before the first and after the last step, which always have one."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the newest is kept until model.path is written. 0: only at a stop and after the last
    step."""

    def __post_init__(self) -> None:
        require(self.steps >= 1, "warmstart.steps", self.steps, ">= 1")
        require(self.batch_size >= 1, "warmstart.batch_size", self.batch_size, ">= 1")
        require(self.lr >= 0, "warmstart.lr", self.lr, ">= 0")
        require(
            0 <= self.observation_weight <= 1,
            "warmstart.observation_weight",
            self.observation_weight,
            "in [0, 1]",
        )
        require(self.weight_decay >= 0, "warmstart.weight_decay", self.weight_decay, ">= 0")
        require(0 <= self.held_out < 1, "warmstart.held_out", self.held_out, "in [0, 1)")
        for name in ("evaluate_every", "checkpoint_every"):
            require(getattr(self, name) >= 0, f"warmstart.{name}", getattr(self, name), ">= 0")
