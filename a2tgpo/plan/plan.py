"""Predict whether a configuration fits a cluster, how a step is divided, and how long the step takes."""

from __future__ import annotations

from dataclasses import dataclass

from a2tgpo.config.algorithm import WITH_CONTRAST
from a2tgpo.config.run import RunConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.plan.adapters import adapter_fault, adapter_flops
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
from a2tgpo.plan.train_time import PassTime, score_time, update_repeats, update_time
from a2tgpo.plan.transfers import transfer_time
from a2tgpo.plan.workload import Workload, geometry


@dataclass(frozen=True, kw_only=True)
class Plan(PlanInputs):
    """All predictions for a configuration, and the inputs from which they are computed."""

    given_config: RunConfig
    """The original configuration. In `config`, the engine's share and its cache always have values."""
    phases: list[Phase]
    host_by_rank: list[HostMemory]
    rollout: RolloutTime
    score: PassTime
    """Time of one scoring pass. A step has `score_passes` scoring passes."""
    update: PassTime
    refit_s: float
    transfer_s: float
    """Time in which state moves between the GPUs and their hosts."""

    @property
    def share_is_chosen(self) -> bool:
        """Whether the plan chose the engine's share of the GPU, because `rollout.gpu_memory_fraction` is 0."""
        return not self.given_config.rollout.gpu_memory_fraction

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Predicted seconds of each stage of one training step, by the stage's name."""
        return {
            "refit": self.refit_s,
            "rollout": self.rollout.seconds,
            "score": self.score_passes * self.score.seconds,
            "update": self.update.seconds,
            "transfers": self.transfer_s,
            "other": self.assumed.fixed_s,
        }

    @property
    def searches(self) -> SearchDemand:
        """The load that the rollout puts on the search server."""
        return search_demand(self, self.rollout.seconds)

    @property
    def score_passes(self) -> int:
        """Number of scoring passes over all tokens of a step.

        One pass computes the old log-probs if a step has several mini-batches. The plan counts a pass over all
        mini-batches, although a run does not score the first one. The reference makes one pass for the KL penalty,
        and one if it scores the gold answers. Contrast prompts need one pass, which runs for each mini-batch before
        its update.
        """
        config = self.config
        by_reference = (config.algorithm.kl_coef > 0) + (config.rollout.gain.scorer == "reference")
        has_contrast = config.algorithm.token_credit in WITH_CONTRAST
        return (self.geometry.optimizer_steps > 1) + by_reference + has_contrast

    @property
    def step_seconds(self) -> float:
        return sum(self.stage_seconds.values())

    @property
    def run_seconds(self) -> float:
        """Predicted seconds of `run.steps` steps, without evaluations, checkpoints and starts."""
        return self.config.run.steps * self.step_seconds

    @property
    def token_flops(self) -> float:
        """Operations of one token's forward pass in the trainer, averaged over all tokens."""
        w = self.workload
        flops = forward_flops(self.dimensions, context=w.tokens / 2, output_share=w.output_share)
        return flops.total + adapter_flops(self.config, self.dimensions)

    @property
    def stage_flops(self) -> dict[str, float]:
        """The model's operations in the scoring and in the update of one step, without recomputed operations."""
        w, tokens = self.workload, self.geometry.tokens
        once = self.token_flops * tokens
        update = 3 * once
        if self.config.model.lora.enabled:  # frozen weights get no gradients
            flops = forward_flops(self.dimensions, context=w.tokens / 2, output_share=w.output_share)
            update -= (flops.total - flops.attention) * tokens
        return {"score": self.score_passes * once, "update": update_repeats(self.config) * update}

    @property
    def update_mfu(self) -> float:
        """Operations per second that the update reaches, as a share of the GPUs' peak in the model's dtype."""
        peak = self.gpu.peak_flops(self.config.model.dtype) * self.gpus
        return self.stage_flops["update"] / self.update.seconds / peak

    @property
    def holds_a_sequence(self) -> bool:
        """Whether the engine's cache can hold one sequence of full length. If it cannot, vLLM refuses to start."""
        return self.geometry.full_sequences >= 1

    @property
    def host(self) -> HostMemory:
        """Host memory of the node that needs the most."""
        return fullest_node(self.host_by_rank, ranks_per_node=self.gpu.gpus_per_node)

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint."""
        return checkpoint_bytes(self.config, self.dimensions)

    @property
    def kept_bytes(self) -> float:
        """Largest number of bytes that all checkpoints together take on disk at any time."""
        return kept_bytes(self.config, self.dimensions, most_kept(self.config))

    @property
    def restart_bytes(self) -> int:
        """Bytes that all ranks together read from storage when a start resumes from a checkpoint."""
        per_node = self.gpu.gpus_per_node
        return restart_bytes(self.config, self.dimensions, gpus=self.gpus, gpus_per_node=per_node)

    @property
    def fits_on_hosts(self) -> bool:
        """Whether each node's memory holds its processes, its offloaded state and a checkpoint being written."""
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
    """Plan a run of `config` on a cluster of `gpus` GPUs.

    Args:
        workload: the expected mean trajectory. Values above the limits of `config` are reduced to these limits.

    Raises:
        ConfigError: with a one-line message, if the layout does not divide the model or the GPUs, or if FP8 is
            impossible.
    """
    fault = (
        layout_fault(dimensions, config.parallel, gpus)
        or engine_fault(config, dimensions, gpus)
        or precision_fault(config, dimensions, gpu)
        or adapter_fault(config.model.lora, dimensions)
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
        host_by_rank=host_memory_by_rank(config, dimensions, divided),
        rollout=rollout_time(given),
        score=score_time(given),
        update=update_time(given),
        refit_s=refit_time(given),
        transfer_s=transfer_time(given),
    )
