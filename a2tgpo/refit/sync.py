"""Move the policy's weights to the engine, and verify that the engine computes with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from a2tgpo.batch.packing import pack
from a2tgpo.config.run import RunConfig
from a2tgpo.memory.phases import MemoryPhases
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.model.policy import Policy
from a2tgpo.parallel.collectives import broadcast_object
from a2tgpo.refit.handover import refit
from a2tgpo.refit.verify import probe_tokens, probe_tolerance, probe_trajectory, verify_refit
from a2tgpo.rollout.vllm_engine import VllmEngine
from a2tgpo.update.logprobs import compute_logprobs


def sync_engine(
    policy: Policy, engine: VllmEngine, phases: MemoryPhases, config: RunConfig, *, version: int
) -> MetricSums:
    """Give the engine the policy's weights, and enter the memory phase `rollout`. Every rank must call this.

    New weights are verified on a fixed probe. The first weights of a run are also verified, because engine and
    trainer read them from the same files with different code.

    Args:
        version: the number of steps for which the weights were trained.

    Raises:
        RuntimeError: if the log-probs of engine and trainer differ too much on the probe.
    """
    phases.enter("refit")
    report = refit(policy, engine, version=version, bucket_mib=config.refit.bucket_mib)
    metrics, is_new = MetricSums(), not report.skipped or version == 0
    probe = probe_tokens(engine.num_token_ids, config.refit.probe_tokens)
    trainer_logprobs = score_probe(policy, probe) if is_new else None
    phases.enter("rollout")
    if trainer_logprobs is not None:
        gap = verify_refit(
            engine,
            probe,
            trainer_logprobs,
            version=version,
            tolerance=_tolerance(config, engine),
            group=dist.group.WORLD,
        )
        metrics.add_max("refit/probe_gap_mean", gap.mean)
        metrics.add_max("refit/probe_gap_max", gap.max)
        metrics.add("refit/gigabytes", report.num_bytes / 1e9, 1)
    return metrics


def score_probe(policy: Policy, probe: Sequence[int]) -> Tensor:
    """Return the trainer's log p of `probe[1:]`, [len(probe) - 1] float32 on the CPU. Every rank must call this."""
    batch = pack([probe_trajectory(probe)], [0], align=policy.alignment)
    (scored,) = compute_logprobs(policy, [batch])
    logprobs = None if scored is None else scored.logprobs.cpu()[batch.loss_mask[0]]
    if policy.groups.pp_size > 1:
        logprobs = broadcast_object(logprobs, policy.groups.pp_group, source=policy.groups.pp_size - 1)
    assert logprobs is not None, "the last pipeline stage scores the probe"
    return logprobs


def _tolerance(config: RunConfig, engine: VllmEngine) -> float:
    model, quantization = config.model, config.rollout.quantization
    return probe_tolerance(
        config.refit.probe_tolerance,
        trainer_dtype="fp8" if model.fp8.enabled else model.dtype,
        engine_dtype=engine.dtype if quantization == "none" else quantization,
    )
