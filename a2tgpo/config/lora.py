"""Settings of low-rank adapters."""

from dataclasses import dataclass

from a2tgpo.io.errors import one_of, require

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The projections of a layer that can have an adapter, by their names in Hugging Face models."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters, LoRA (arXiv 2106.09685): a layer computes x W^T + alpha / rank * x A^T B^T, and only A and B
    are trained."""

    rank: int = 0
    """Rank of the adapters, the number of rows of A and of columns of B. `0`: no adapters; all weights are
    trained."""
    alpha: float = 32.0
    """Scale of the adapters. B A is multiplied by alpha / rank."""
    targets: tuple[str, ...] = PROJECTIONS
    """Projections that have adapters. In a mixture of experts only q_proj, k_proj, v_proj and o_proj can have
    adapters; other names are ignored."""

    @property
    def enabled(self) -> bool:
        return self.rank > 0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def targets_of(self, *, has_experts: bool) -> tuple[str, ...]:
        """Return the projections of a model that have adapters, in the order of `PROJECTIONS`."""
        possible = PROJECTIONS[:4] if has_experts else PROJECTIONS
        return tuple(name for name in possible if name in self.targets)

    def __post_init__(self) -> None:
        require(self.rank >= 0, "model.lora.rank", self.rank, ">= 0")
        require(self.alpha > 0, "model.lora.alpha", self.alpha, "> 0")
        require(bool(self.targets), "model.lora.targets", list(self.targets), "at least one projection")
        for name in self.targets:
            require(name in PROJECTIONS, "model.lora.targets", name, one_of(PROJECTIONS, name))
