"""The machines for which a configuration is planned."""

from dataclasses import dataclass

from a2tgpo.io.errors import require

GPU_KINDS = ("a100-80gb", "h100-80gb", "h200-141gb", "h20-96gb", "b200-180gb", "gb200-186gb")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """What plans are made for where nothing else is said (`tools/plan.py`, `--dry-run`).

    A run takes the processes it is started with, and the cards it finds.
    """

    gpus: int = 8
    """Cards, one process each."""
    gpu: str = "h100-80gb"
    """Kind of card: a100-80gb | h100-80gb | h200-141gb | h20-96gb | b200-180gb | gb200-186gb."""

    def __post_init__(self) -> None:
        require(self.gpus >= 1, "cluster.gpus", self.gpus, ">= 1")
        require(self.gpu in GPU_KINDS, "cluster.gpu", self.gpu, " | ".join(GPU_KINDS))
