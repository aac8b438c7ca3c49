"""The GPUs for which a configuration is planned."""

from dataclasses import dataclass
from typing import Literal

from a2tgpo.io.errors import require

GpuKind = Literal["a100-80gb", "h100-80gb", "h200-141gb", "h20-96gb", "b200-180gb", "gb200-186gb"]


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """The cluster that `tools/plan.py` and `--dry-run` assume by default, and the excess at which a start is refused.

    These settings do not choose the hardware: a run uses the processes with which it is started, and the GPUs of
    their machines.
    """

    gpus: int = 8
    """Number of GPUs; each GPU has one process."""
    gpu: GpuKind = "h100-80gb"
    """Kind of GPU."""
    plan_margin: float = 0.5
    """Excess over the free memory of a GPU or of a machine, as a share of this memory. If the plan of a start on GPUs
    has a larger excess, the start is refused. If it has a smaller one, or if this setting is 0, the start only prints
    a warning. The default is large because no plan has been compared with a real GPU yet. The estimate may be wrong
    by a tenth, but not by half. A dry run reports every excess."""

    def __post_init__(self) -> None:
        require(self.gpus >= 1, "cluster.gpus", self.gpus, ">= 1")
        require(self.plan_margin >= 0, "cluster.plan_margin", self.plan_margin, ">= 0")

    def refuses(self, planned: float, available: float) -> bool:
        """Return whether a start must be refused if its plan needs `planned` and `available` memory is free."""
        return self.plan_margin > 0 and planned > (1 + self.plan_margin) * available
