"""One configuration on one cluster: whether it fits, how a step is divided, how long it should take."""

from __future__ import annotations

from dataclasses import dataclass

from a2tgpo.config.run import RunConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.plan.assumptions import Assumptions
from a2tgpo.plan.dimensions import ModelDimensions, layout_fault
from a2tgpo.plan.engine import engine_fault, engine_memory
from a2tgpo.plan.engine_share import with_engine_share
from a2tgpo.plan.flops import forward_flops
from a2tgpo.plan.hardware import GIB, Gpu
from a2tgpo.plan.host_memory import HostMemory, fullest_node, host_memory_by_rank
from a2tgpo.plan.inputs import PlanInputs
from a2tgpo.plan.memory import Phase, memory_phases
from a2tgpo.plan.precision import precision_fault
from a2tgpo.plan.rollout_time import RolloutTime, refit_time, rollout_time
from a2tgpo.plan.search_rate import SearchDemand, search_demand
from a2tgpo.plan.storage import checkpoint_bytes, kept_bytes, most_kept, restart_bytes
from a2tgpo.plan.train_time import PassTime, score_time, update_time
from a2tgpo.plan.workload import Workload, geometry


@dataclass(frozen=True, kw_only=True)
class Plan(PlanInputs):
    """What is predicted, beside what from."""

    given_config: RunConfig
    """As it was given; in `config` the engine's share of the card and its cache are numbers."""
    phases: list[Phase]
    host_by_rank: list[HostMemory]
    rollout: RolloutTime
    score: PassTime
    """One pass; `score_passes` tells how many there are."""
    update: PassTime
    refit_s: float

    @property
    def share_is_chosen(self) -> bool:
        """By the plan, since the configuration leaves `rollout.gpu_memory_fraction` open."""
        return not self.given_config.rollout.gpu_memory_fraction

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Predicted seconds of one training step by stage."""
        return {
            "refit": self.refit_s,
            "rollout": self.rollout.seconds,
            "score": self.score_passes * self.score.seconds,
            "update": self.update.seconds,
            "other": self.assumed.fixed_s,
        }

    @property
    def searches(self) -> SearchDemand:
        """What the rollout asks of the search server."""
        return search_demand(self, self.rollout.seconds)

    @property
    def score_passes(self) -> int:
        """By the policy where a step has several mini-batches, and by the reference where there is one."""
        return (self.geometry.optimizer_steps > 1) + (self.config.algorithm.kl_coef > 0)

    @property
    def step_seconds(self) -> float:
        return sum(self.stage_seconds.values())

    @property
    def run_seconds(self) -> float:
        """Of `run.steps`, without evaluations, checkpoints and starts."""
        return self.config.run.steps * self.step_seconds

    @property
    def token_flops(self) -> float:
        """Operations of one token's forward pass by the trainer, in the mean."""
        w = self.workload
        return forward_flops(self.dimensions, context=w.tokens / 2, output_share=w.output_share).total

    @property
    def stage_flops(self) -> dict[str, float]:
        """Model operations of a step by stage; recomputation is none of them."""
        once = self.token_flops * self.geometry.tokens
        return {"score": self.score_passes * once, "update": 3 * once}

    @property
    def update_mfu(self) -> float:
        """Model operations of the update against the cards' bfloat16 (or float32) peak."""
        peak = self.gpu.peak_flops(self.config.model.dtype) * self.gpus
        return self.stage_flops["update"] / self.update.seconds / peak

    @property
    def holds_a_sequence(self) -> bool:
        """The engine's cache holds one sequence of full length; vLLM refuses to start with less."""
        return self.geometry.full_sequences >= 1

    @property
    def host(self) -> HostMemory:
        """Host memory of the fullest node."""
        return fullest_node(self.host_by_rank, ranks_per_node=self.gpu.gpus_per_node)

    @property
    def checkpoint_bytes(self) -> int:
        """Size of one checkpoint."""
        return checkpoint_bytes(self.config, self.dimensions)

    @property
    def kept_bytes(self) -> float:
        """Of all checkpoints that are on the disk at a time, at the most."""
        return kept_bytes(self.config, self.dimensions, most_kept(self.config))

    @property
    def restart_bytes(self) -> int:
        """Read from storage by all ranks of a start that goes on from a checkpoint."""
        per_node = self.gpu.gpus_per_node
        return restart_bytes(self.config, self.dimensions, gpus=self.gpus, gpus_per_node=per_node)

    @property
    def fits_on_hosts(self) -> bool:
        """What leaves the cards, and a checkpoint beside it, have room in the nodes' memory."""
        return self.host.total <= self.gpu.host_memory_gib * GIB

    @property
    def fits(self) -> bool:
        return self.holds_a_sequence and self.fits_on_hosts and all(phase.fits for phase in self.phases)


def make_plan(
    config: RunConfig,
    dimensions: ModelDimensions,
    gpu: Gpu,
    *,
    gpus: int,
    workload: Workload | None = None,
    assumed: Assumptions | None = None,
) -> Plan:
    """The plan of `config` on `gpus` cards.

    Args:
        workload: what a trajectory is expected to be, cut to the limits of `config`; None: the defaults.

    Raises:
        ConfigError: one line, if the layout divides neither the model nor the cards, or FP8 cannot be.
    """
    fault = (
        layout_fault(dimensions, config.parallel, gpus)
        or engine_fault(config, dimensions, gpus)
        or precision_fault(config, dimensions, gpu)
    )
    if fault is not None:
        raise ConfigError(fault)
    assumed = assumed or Assumptions()
    given_config = config
    config = with_engine_share(config, dimensions, gpu, gpus=gpus, assumed=assumed)
    workload = (workload or Workload()).limited(config)
    cache = engine_memory(config, dimensions, gpu).kv_cache
    divided = geometry(config, dimensions, workload, gpus=gpus, kv_cache_bytes=cache)
    given = PlanInputs(
        config=config,
        dimensions=dimensions,
        gpu=gpu,
        gpus=gpus,
        workload=workload,
        assumed=assumed,
        geometry=divided,
    )
    return Plan(
        **vars(given),
        given_config=given_config,
        phases=memory_phases(config, dimensions, gpu, divided, assumed),
        host_by_rank=host_memory_by_rank(config, dimensions, data_parallel=divided.data_parallel),
        rollout=rollout_time(given),
        score=score_time(given),
        update=update_time(given),
        refit_s=refit_time(given),
    )
