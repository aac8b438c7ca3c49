"""Move the policy's weights to the engine, and verify that the engine computes with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from a2tgpo.batch.packing import pack
from a2tgpo.config.run import RunConfig
from a2tgpo.memory.phases import MemoryPhases
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.model.policy import Policy
from a2tgpo.parallel.collectives import broadcast_object
from a2tgpo.parallel.groups import ParallelGroups
from a2tgpo.refit.handover import refit
from a2tgpo.refit.verify import probe_tokens, probe_tolerance, probe_trajectory, verify_refit
from a2tgpo.rollout.vllm_engine import VllmEngine
from a2tgpo.update.logprobs import compute_logprobs


class WeightHolders(Protocol):
    """Policy and engine with their configuration; `RunParts` has these attributes."""

    @property
    def config(self) -> RunConfig: ...

    @property
    def groups(self) -> ParallelGroups: ...

    @property
    def policy(self) -> Policy: ...

    @property
    def engine(self) -> VllmEngine: ...

    @property
    def phases(self) -> MemoryPhases: ...


def sync_engine(parts: WeightHolders, *, step: int) -> MetricSums:
    """Give the engine the weights of `step` updates and enter memory phase rollout; every rank must call this.

    Weights that the engine already holds are not moved again. New weights are verified on a fixed probe; so are the
    first weights of a run, which engine and trainer read from the same files by different code.

    Raises:
        RuntimeError: engine and trainer disagree on the probe.
    """
    parts.phases.enter("refit")
    report = refit(parts.policy, parts.engine, version=step, bucket_mib=parts.config.refit.bucket_mib)
    metrics, is_new = MetricSums(), not report.skipped or step == 0
    probe = probe_tokens(parts.engine.num_token_ids, parts.config.refit.probe_tokens)
    trainer_logprobs = score_probe(parts, probe) if is_new else None
    parts.phases.enter("rollout")
    if trainer_logprobs is not None:
        gap = verify_refit(
            parts.engine,
            probe,
            trainer_logprobs,
            step=step,
            tolerance=_tolerance(parts),
            group=dist.group.WORLD,
        )
        metrics.add_max("refit/probe_gap_mean", gap.mean)
        metrics.add_max("refit/probe_gap_max", gap.max)
        metrics.add("refit/gigabytes", report.num_bytes / 1e9, 1)
    return metrics


def score_probe(parts: WeightHolders, probe: Sequence[int]) -> Tensor:
    """Return the trainer's log p of `probe[1:]`, [len(probe) - 1] float32 on the CPU; every rank must call this."""
    batch = pack([probe_trajectory(probe)], [0], align=parts.policy.alignment)
    (scored,) = compute_logprobs(parts.policy, [batch])
    logprobs = None if scored is None else scored.logprobs.cpu()[batch.loss_mask[0]]
    if parts.groups.pp_size > 1:
        logprobs = broadcast_object(logprobs, parts.groups.pp_group, source=parts.groups.pp_size - 1)
    assert logprobs is not None, "the last pipeline stage scores the probe"
    return logprobs


def _tolerance(parts: WeightHolders) -> float:
    model, quantization = parts.config.model, parts.config.rollout.quantization
    return probe_tolerance(
        parts.config.refit.probe_tolerance,
        trainer_dtype="fp8" if model.fp8.enabled else model.dtype,
        engine_dtype=parts.engine.dtype if quantization == "none" else quantization,
    )
