"""The engine brought to the policy's weights, and the proof that it computes with them."""

from __future__ import annotations

from typing import Protocol

import torch.distributed as dist

from a2tgpo.batch.packing import alignment, pack
from a2tgpo.config.run import RunConfig
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.model.policy import Policy
from a2tgpo.parallel.collectives import broadcast_object
from a2tgpo.parallel.groups import ParallelGroups
from a2tgpo.refit.handover import refit
from a2tgpo.refit.verify import (
    ProbeGap,
    probe_tokens,
    probe_tolerance,
    probe_trajectory,
    verify_refit,
)
from a2tgpo.rollout.vllm_engine import VllmEngine
from a2tgpo.update.score import score


class WeightHolders(Protocol):
    """The two that hold the weights, and what they were built from; `RunParts` is one."""

    @property
    def config(self) -> RunConfig: ...

    @property
    def groups(self) -> ParallelGroups: ...

    @property
    def policy(self) -> Policy: ...

    @property
    def engine(self) -> VllmEngine: ...


def sync_engine(parts: WeightHolders, *, step: int) -> MetricSums:
    """Wake the engine with the weights of `step` updates; every rank must call this.

    Weights the engine holds already are not moved again; new ones are verified on a fixed probe, and so are the
    first ones of a run, which engine and trainer read from the same files by different code.

    Raises:
        RuntimeError: if engine and trainer disagree on the probe.
    """
    parts.engine.wake("weights")
    report = refit(parts.policy, parts.engine, version=step, bucket_mib=parts.config.refit.bucket_mib)
    parts.engine.wake("kv_cache")
    metrics = MetricSums()
    if not report.skipped or step == 0:
        gap = verify(parts, step=step)
        metrics.add_max("refit/probe_gap_mean", gap.mean)
        metrics.add_max("refit/probe_gap_max", gap.max)
        metrics.add("refit/gigabytes", report.num_bytes / 1e9, 1)
    return metrics


def verify(parts: WeightHolders, *, step: int) -> ProbeGap:
    """Compare the probe's log-probs in trainer and engine on every rank."""
    probe = probe_tokens(parts.engine.num_token_ids, parts.config.refit.probe_tokens)
    trajectory = probe_trajectory(probe)
    batch = pack([trajectory], [0], align=alignment(parts.config.parallel, parts.config.model.fp8))
    (scored,) = score(parts.policy, [batch])
    logprobs = None if scored is None else scored.logprobs.cpu()[batch.loss_mask[0]]
    if parts.groups.pp_size > 1:
        logprobs = broadcast_object(logprobs, parts.groups.pp_group, source=parts.groups.pp_size - 1)
    assert logprobs is not None, "the last pipeline stage scores the probe"
    model, quantization = parts.config.model, parts.config.rollout.quantization
    tolerance = probe_tolerance(
        parts.config.refit.probe_tolerance,
        trainer_dtype="fp8" if model.fp8.enabled else model.dtype,
        engine_dtype=parts.engine.dtype if quantization == "none" else quantization,
    )
    return verify_refit(parts.engine, probe, logprobs, step=step, tolerance=tolerance, group=dist.group.WORLD)
