"""The machines that a configuration is meant for."""

from dataclasses import dataclass
from typing import Literal

from a2tgpo.io.errors import require

GpuKind = Literal["a100-80gb", "h100-80gb", "h200-141gb", "h20-96gb", "b200-180gb", "gb200-186gb"]


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """The cluster that plans assume by default (`tools/plan.py`, `--dry-run`), and how a start uses its plan.

    A run uses the processes that it is started with, and the GPUs that it finds.
    """

    gpus: int = 8
    """Number of GPUs, one process each."""
    gpu: GpuKind = "h100-80gb"
    """Kind of GPU."""
    plan_margin: float = 0.5
    """A start on GPUs is refused if its plan exceeds a GPU's or a machine's free memory by more than this share, and
    warns below; 0: only warns. The default is wide because no plan has been compared with a GPU yet: an excess of a
    tenth may be the estimate's error, an excess of half is not. A dry run reports every excess."""

    def __post_init__(self) -> None:
        require(self.gpus >= 1, "cluster.gpus", self.gpus, ">= 1")
        require(self.plan_margin >= 0, "cluster.plan_margin", self.plan_margin, ">= 0")

    def refuses(self, planned: float, available: float) -> bool:
        """Return whether to refuse a start whose plan takes `planned` of the `available` memory."""
        return self.plan_margin > 0 and planned > (1 + self.plan_margin) * available
