"""Predict the host memory that each rank and each node needs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, fields

from a2tgpo.batch.expert_rows import ExpertShape
from a2tgpo.config.run import RunConfig
from a2tgpo.plan.activations import FLOAT32_BYTES
from a2tgpo.plan.adapters import all_adapters, trained_parameters
from a2tgpo.plan.dimensions import ModelDimensions
from a2tgpo.plan.engine import ELEMENT_BYTES
from a2tgpo.plan.hardware import GIB
from a2tgpo.plan.memory import trainer_memory
from a2tgpo.plan.parameters import largest_tensor, optimizer_parameters
from a2tgpo.plan.workload import Geometry

PROCESS_GIB = 4.0
"""GiB of a rank's process for Python, torch, and the host side of CUDA and NCCL. The value is a guess."""


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Bytes of host memory that one rank needs, or that several ranks need together."""

    offloaded: float
    """Page-locked memory for state that was offloaded from the GPU; 0 if `update.offload` is False."""
    saving: float
    """Copies of the state that is being written to a checkpoint."""
    loading: float
    """Tensors that a rank reads from a checkpoint or from `model.path` when it starts, before any state is offloaded
    or saved."""
    processes: float
    before_update: float = 0.0
    """Page-locked copies of weights and optimizer state, from which extrapolated updates are computed. They stay
    allocated between updates."""
    experts: float = 0.0
    """The experts that the engine chose for the tokens of a step; 0 without `rollout.router_replay`."""

    @property
    def lasting(self) -> float:
        """Peak while the run trains. All parts exist together, because the next step runs during a save."""
        return self.processes + self.offloaded + self.saving + self.before_update + self.experts

    @property
    def total(self) -> float:
        """Peak over time."""
        return max(self.lasting, self.processes + self.loading)

    def __add__(self, other: HostMemory) -> HostMemory:
        return HostMemory(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


def host_memory_by_rank(
    config: RunConfig, dimensions: ModelDimensions, divided: Geometry
) -> list[HostMemory]:
    """Return each rank's host memory, in rank order. Ranks of the same pipeline stage have consecutive numbers."""
    parallel = config.parallel
    by_stage = [_of_stage(config, dimensions, stage, divided) for stage in range(parallel.pipeline)]
    ranks_of_stage = divided.data_parallel * parallel.context * parallel.tensor
    first, *others = [memory for memory in by_stage for _ in range(ranks_of_stage)]
    # Rank 0 holds PEFT's file of all adapters, and the tensors from which it makes the file.
    files = 2 * all_adapters(config, dimensions) * ELEMENT_BYTES[config.model.dtype]
    return [dataclasses.replace(first, saving=first.saving + files), *others]


def fullest_node(by_rank: list[HostMemory], *, ranks_per_node: int) -> HostMemory:
    """Return the memory of the node that needs the most, if consecutive ranks fill one node after the other."""
    nodes = [
        sum_of(by_rank[first : first + ranks_per_node]) for first in range(0, len(by_rank), ranks_per_node)
    ]
    return max(nodes, key=lambda node: node.total)


def sum_of(ranks: list[HostMemory]) -> HostMemory:
    """Return the memory of all `ranks` together. `ranks` must not be empty."""
    first, *others = ranks
    return sum(others, start=first)


def _of_stage(config: RunConfig, dimensions: ModelDimensions, stage: int, divided: Geometry) -> HostMemory:
    data_parallel = divided.data_parallel
    trainer = trainer_memory(config, dimensions, stage=stage, data_parallel=data_parallel)
    element_bytes = ELEMENT_BYTES[config.model.dtype]
    # A data-parallel rank writes only its own part of the optimizer's state and of the weights.
    trained = trained_parameters(config, dimensions, stage)
    share = optimizer_parameters(trained, config.parallel, data_parallel)
    state_bytes = (3 if config.model.dtype == "bfloat16" else 2) * FLOAT32_BYTES
    return HostMemory(
        offloaded=trainer.offloaded if config.update.offload else 0.0,
        saving=share * (element_bytes + state_bytes),
        # The factor is 2, because the whole tensor and its tensor-parallel parts exist at once.
        loading=2 * largest_tensor(dimensions, config.parallel.tensor) * element_bytes,
        processes=PROCESS_GIB * GIB,
        before_update=trainer.before_update if config.update.extrapolation.is_on else 0.0,
        experts=_expert_bytes(config, dimensions, divided),
    )


def _expert_bytes(config: RunConfig, dimensions: ModelDimensions, divided: Geometry) -> float:
    """Return the bytes of the rows of experts on a rank, averaged over the ranks of an engine.

    A rank has the rows of its replica's trajectories twice, before and after packing. The first rank of an engine has
    the rows of the trajectories that the engine played, and vLLM's rows for the tokens in its cache.
    """
    if not config.rollout.router_replay:
        return 0.0
    shape = ExpertShape(
        layers=dimensions.layers, chosen=dimensions.experts_per_token, experts=dimensions.experts
    )
    of_engine = divided.tokens / divided.engines + divided.kv_tokens
    tokens = 2 * divided.tokens / divided.data_parallel + of_engine / config.rollout.tensor_parallel
    return tokens * shape.row_bytes
