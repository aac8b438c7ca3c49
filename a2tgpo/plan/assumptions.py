"""Assumptions of a plan. The values are round figures, and most can be replaced with measurements
(`plan.measured`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    compute_utilisation: float = 0.45
    """Share of the GPU's peak that matrix products and attention reach, gaps between kernels included."""
    fp8_speed: float = 1.5
    """Speed of linear layers in FP8 relative to bfloat16, quantisation included. FP8's peak is twice bfloat16's."""
    imbalance: float = 0.05
    """Share of the computing time in which a replica waits for the replica with the most tokens."""
    memory_utilisation: float = 0.7
    """Share of the memory bandwidth that decoding and the optimizer reach."""
    link_utilisation: float = 0.7
    """Share of a link's bandwidth that collectives reach."""
    prefill_utilisation: float = 0.4
    """Share of the GPU's peak that the engine reaches in prefill."""
    decode_step_s: float = 0.006
    """Seconds per engine step in which the GPU waits for scheduling, launches and sampling."""
    decode_sequence_s: float = 20e-6
    """Seconds that each running trajectory adds to an engine step on the host."""
    collective_latency_s: float = 12e-6
    """Seconds of one small all-reduce in the engine. An engine step has two all-reduces per layer."""
    tail_concurrency: float = 0.125
    """Share of the concurrent trajectories that still run, on average, in the rollout's tail. The tail begins
    when the trajectories of mean length end."""
    answer_tokens: float = 16.0
    """Tokens of scaffold and gold answer together. The engine scores these tokens after every turn."""
    fixed_s: float = 5.0
    """Seconds per step for advantages, packing, records, the exchange of trajectories, and the engine's sleep and
    wake-up."""
    activation_ratio: float = 1.0
    """Actual memory of the layers' activations, divided by the memory computed from their shapes."""
    context_gib: float = 3.0
    """GiB on every rank for the CUDA contexts, NCCL buffers and cuBLAS workspaces of trainer and engine.

    The value includes Transformer Engine's placeholders for weight gradients: one tensor for each shape of a layer's
    weights. For a 72B model on 8 tensor-parallel ranks, they take 0.2 GiB.
    """
    fragmentation: float = 0.03
    """Memory lost to fragmentation, as a share of all other memory on the GPU."""
