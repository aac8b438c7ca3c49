"""The GPUs for which a configuration is planned."""

from dataclasses import dataclass
from typing import Literal

from a2tgpo.io.errors import require

GpuKind = Literal["a100-80gb", "h100-80gb", "h200-141gb", "h20-96gb", "b200-180gb", "gb200-186gb"]


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """The GPUs that `tools/plan.py` and `--dry-run` assume, and the memory limit above which a run is refused.

    A run itself uses the processes with which it is started.
    """

    gpus: int = 8
    """Number of GPUs, with one process each."""
    gpu: GpuKind = "h100-80gb"
    """Kind of GPU."""
    plan_margin: float = 0.5
    """A run on GPUs is refused if its plan exceeds the memory of a GPU, or the free host memory of a machine, by more
    than this share of that memory. If the excess is smaller, a warning is printed. `0`: never refuse a run. The
    default is high, because the plan has not been compared with a real GPU yet."""

    def __post_init__(self) -> None:
        require(self.gpus >= 1, "cluster.gpus", self.gpus, ">= 1")
        require(self.plan_margin >= 0, "cluster.plan_margin", self.plan_margin, ">= 0")

    def refuses(self, planned: float, available: float) -> bool:
        """Return whether to refuse a start that needs `planned` memory if `available` memory is free."""
        return self.plan_margin > 0 and planned > (1 + self.plan_margin) * available
