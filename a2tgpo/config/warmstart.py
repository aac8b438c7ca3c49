"""Supervised warm start on demonstrations (launch/warmstart.py)."""

from dataclasses import dataclass

from a2tgpo.config.check import require
from a2tgpo.config.expand import Expanded


@dataclass(frozen=True, kw_only=True)
class WarmstartConfig:
    source: Expanded = ""
    """Hugging Face folder of the cold model; the warm-started one is written to model.path."""
    demonstrations: Expanded = ""
    """JSONL of demonstrations, made by tools/prepare_data.py."""
    steps: int = 200
    """Optimizer steps."""
    batch_size: int = 64
    """Demonstrations per optimizer step, over all ranks."""
    lr: float = 1e-3
    """Peak learning rate; linear warm-up over a tenth of the steps, cosine decay to a tenth."""
    weight_decay: float = 0.01
    observation_weight: float = 0.0
    """Weight of prompt and observation tokens in the loss, the policy's own have 1; helps a model that has never
    been trained to learn to copy. 0 for pre-trained models."""

    def __post_init__(self) -> None:
        require(self.steps >= 1, "warmstart.steps", self.steps, ">= 1")
        require(self.batch_size >= 1, "warmstart.batch_size", self.batch_size, ">= 1")
        require(self.lr > 0, "warmstart.lr", self.lr, "> 0")
        require(
            0 <= self.observation_weight <= 1,
            "warmstart.observation_weight",
            self.observation_weight,
            "in [0, 1]",
        )
        require(self.weight_decay >= 0, "warmstart.weight_decay", self.weight_decay, ">= 0")
