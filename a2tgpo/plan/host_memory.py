"""Host memory of ranks and nodes: offloaded GPU state, and checkpoints being written."""

from __future__ import annotations

from dataclasses import dataclass, fields

from a2tgpo.config.run import RunConfig
from a2tgpo.plan.activations import FLOAT32_BYTES
from a2tgpo.plan.dimensions import ModelDimensions
from a2tgpo.plan.engine import ELEMENT_BYTES
from a2tgpo.plan.hardware import GIB
from a2tgpo.plan.memory import trainer_memory
from a2tgpo.plan.parameters import largest_tensor, optimizer_parameters, stage_parameters

PROCESS_GIB = 4.0
"""Memory of a rank's process, trainer and engine, GiB: Python, torch, the host side of CUDA and NCCL. A round
figure.
"""


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Bytes of host memory of one or several ranks."""

    offloaded: float
    """Page-locked memory for state offloaded from the GPU; 0 without `update.offload`."""
    saving: float
    """Copies of the state that is written to a checkpoint; freed once the checkpoint is on disk."""
    loading: float
    """Tensors read at the start, from a checkpoint or from `model.path`, before offloaded and saved state exist."""
    processes: float

    @property
    def total(self) -> float:
        """Peak: a checkpoint is written while the next rollout occupies the GPU."""
        return self.processes + max(self.offloaded + self.saving, self.loading)

    def __add__(self, other: HostMemory) -> HostMemory:
        return HostMemory(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


def host_memory_by_rank(
    config: RunConfig, dimensions: ModelDimensions, *, data_parallel: int
) -> list[HostMemory]:
    """Return each rank's host memory, in rank order: the ranks of a pipeline stage are neighbours."""
    parallel = config.parallel
    by_stage = [
        _of_stage(config, dimensions, stage, data_parallel=data_parallel)
        for stage in range(parallel.pipeline)
    ]
    ranks_of_stage = data_parallel * parallel.context * parallel.tensor
    return [memory for memory in by_stage for _ in range(ranks_of_stage)]


def fullest_node(by_rank: list[HostMemory], *, ranks_per_node: int) -> HostMemory:
    """Return the memory of the fullest node, if ranks fill one node after the other."""
    nodes = [
        sum_of(by_rank[first : first + ranks_per_node]) for first in range(0, len(by_rank), ranks_per_node)
    ]
    return max(nodes, key=lambda node: node.total)


def sum_of(ranks: list[HostMemory]) -> HostMemory:
    """Return the sum over these ranks, of which there is at least one."""
    first, *others = ranks
    return sum(others, start=first)


def _of_stage(
    config: RunConfig, dimensions: ModelDimensions, stage: int, *, data_parallel: int
) -> HostMemory:
    trainer = trainer_memory(config, dimensions, stage=stage, data_parallel=data_parallel)
    element_bytes = ELEMENT_BYTES[config.model.dtype]
    # Each data-parallel rank writes its own part of the optimizer's state, and its share of the weights.
    share = optimizer_parameters(
        stage_parameters(dimensions, config.parallel, stage), config.parallel, data_parallel
    )
    state_bytes = (3 if config.model.dtype == "bfloat16" else 2) * FLOAT32_BYTES
    return HostMemory(
        offloaded=trainer.offloaded if config.update.offload else 0.0,
        saving=share * (element_bytes + state_bytes),
        # The whole tensor, and its tensor-parallel parts.
        loading=2 * largest_tensor(dimensions, config.parallel.tensor) * element_bytes,
        processes=PROCESS_GIB * GIB,
    )
