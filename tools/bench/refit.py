"""Compare the cost of a refit of SmolLM2-135M in bfloat16 on one rank with that of one copy of the weights.

The bench measures the CPU seconds of a whole `refit` (export, handover and the engine's load), of the export alone,
and of the engine's load alone. Each baseline copies the same number of bytes once, tensor by tensor, into allocated
memory. The engine repacks every matrix for its kernels, but only on a CPU. The bench also compares the bytes passed
to the engine with the size of the weights.
"""

from __future__ import annotations

import itertools

import measure
import torch

from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.refit import RefitConfig
from a2tgpo.config.rollout import RolloutConfig
from a2tgpo.config.update import UpdateConfig
from a2tgpo.model.build import build_policy
from a2tgpo.model.weights import iterate_hf_weights
from a2tgpo.parallel.initialize import initialize, shutdown
from a2tgpo.refit.handover import RefitReport, refit
from a2tgpo.rollout.vllm_engine import VllmEngine

MODEL = "artifacts/models/smollm2-135m"
ROUNDS = 5


def rows() -> list[measure.Row]:
    groups = initialize(ParallelConfig(), seed=0)
    policy = build_policy(
        ModelConfig(path=MODEL, dtype="bfloat16"), ParallelConfig(), groups, update=UpdateConfig(lr=1e-6)
    )
    config = RolloutConfig(kv_cache_gib=0.1, max_concurrent=4)
    engine = VllmEngine(MODEL, config=config, model_dtype="bfloat16", max_model_len=512, seed=0)
    ready = {name: tensor.clone() for name, tensor in iterate_hf_weights(policy)}
    copies = {name: torch.empty_like(tensor) for name, tensor in ready.items()}
    versions, reports = itertools.count(1), list[RefitReport]()

    def whole_refit() -> None:
        version = next(versions)
        reports.append(refit(policy, engine, version=version, bucket_mib=RefitConfig().bucket_mib))

    def export() -> None:
        for _ in iterate_hf_weights(policy):
            pass

    def copy() -> None:
        for name, tensor in ready.items():
            copies[name].copy_(tensor)

    seconds = measure.interleaved(
        {
            "refit": whole_refit,
            "export": export,
            "load": lambda: engine.load_weights(ready.items(), version=next(versions)),
            "copy": copy,
        },
        rounds=ROUNDS,
    )
    minimum = sum(parameter.numel() * 2 for model in policy.gpt_models for parameter in model.parameters())
    engine.close()
    shutdown()
    found = [
        measure.compared(
            what,
            seconds[variant],
            seconds["copy"],
            baseline_is="one copy of the weights",
            unit="CPU s",
            ratio_is="ours / baseline",
            target=target,
            note=f"SmolLM2-135M in bfloat16, {minimum / 1e6:.0f} MB",
        )
        for variant, what, target in (
            ("refit", "refit", "<= 3"),
            ("export", "of it the export: names, order of QKV", ""),
            ("load", "of it the engine's load, matrices packed for the CPU's kernels", ""),
        )
    ]
    found.append(
        measure.compared(
            "bytes handed to the engine",
            [reports[-1].num_bytes],
            [minimum],
            baseline_is="the weights",
            unit="bytes",
            ratio_is="ours / baseline",
            target="<= 1.05",
        )
    )
    return found
