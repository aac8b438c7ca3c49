"""Inputs that all predictions of a plan share."""

from __future__ import annotations

from dataclasses import dataclass

from a2tgpo.config.run import RunConfig
from a2tgpo.plan.assumptions import Assumptions
from a2tgpo.plan.dimensions import ModelDimensions
from a2tgpo.plan.engine import ELEMENT_BYTES
from a2tgpo.plan.hardware import Gpu
from a2tgpo.plan.workload import Geometry, Workload


@dataclass(frozen=True, kw_only=True)
class PlanInputs:
    """Inputs for one training step of one configuration on one cluster."""

    config: RunConfig
    dimensions: ModelDimensions
    gpu: Gpu
    gpus: int
    workload: Workload
    assumed: Assumptions
    geometry: Geometry

    @property
    def element_bytes(self) -> int:
        """Bytes per element of the trainer's weights and activations."""
        return ELEMENT_BYTES[self.config.model.dtype]

    @property
    def memory_bytes_per_s(self) -> float:
        """Bandwidth of the GPU's memory that a program actually reaches, bytes per second."""
        return 1e12 * self.gpu.memory_tb_per_s * self.assumed.memory_utilisation

    def link_bytes_per_s(self, ranks: int) -> float:
        """Return the bytes per second that a rank's links reach within a group of `ranks` consecutive ranks."""
        return self.gpu.link_bytes_per_s(ranks) * self.assumed.link_utilisation
