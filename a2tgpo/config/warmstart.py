"""Settings of the warm start: supervised training on demonstrations (launch/warmstart.py)."""

from dataclasses import dataclass

from a2tgpo.config.expand import Expanded
from a2tgpo.io.errors import require


@dataclass(frozen=True, kw_only=True)
class WarmstartConfig:
    source: Expanded = ""
    """Hugging Face folder of the model with which the warm start begins. The result is written to model.path."""
    demonstrations: Expanded = ""
    """JSONL file of demonstrations (docs/warmstart.md)."""
    steps: int = 200
    """Number of optimizer steps."""
    batch_size: int = 64
    """Number of demonstrations per optimizer step over all ranks."""
    lr: float = 0.0
    """Highest learning rate. The rate rises linearly over the first tenth of the steps, and then falls along a cosine
    to a tenth of this value. `0`: 1e-5 x sqrt(8e9 / parameters), at most 1e-3."""
    weight_decay: float = 0.01
    observation_weight: float = 0.0
    """Weight of prompt and observation tokens in the loss; tokens that the policy writes have weight 1. A weight
    above 0 helps an untrained model learn to copy. Use 0 for pre-trained models."""
    fp8: bool = False
    """`true`: compute in FP8 if `model.fp8` turns FP8 on. `false`: compute in model.dtype."""
    held_out: float = 0.02
    """Share of the questions whose demonstrations are held out for the metric `warmstart/held_out_loss`."""
    evaluate_every: int = 50
    """Number of steps between computations of the held-out loss; 0: none. The loss is always computed before the
    first step and after the last one."""
    checkpoint_every: int = 100
    """Number of steps between checkpoints; 0: none. A checkpoint is always written if the warm start is stopped,
    and after the last step. Only the newest checkpoint is kept, until model.path is written."""

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
