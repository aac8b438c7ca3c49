"""Assumptions of a plan: round figures that were not fitted to data. `plan.published` shows the resulting error of
the time model.

Measurements on a GPU can replace most of them (`plan.measured`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    compute_utilisation: float = 0.45
    """Share of the GPU's peak that large matrix products and attention reach, including gaps between kernel
    launches.
    """
    fp8_speed: float = 1.5
    """Speed of linear layers in FP8 relative to bfloat16, quantisation included; the GPU's peak is twice as high."""
    imbalance: float = 0.05
    """Share of the computing time that replicas wait for the replica with the most tokens."""
    memory_utilisation: float = 0.7
    """Share of the memory bandwidth that decoding and the optimizer reach."""
    link_utilisation: float = 0.7
    """Share of a link's bandwidth that collectives reach."""
    prefill_utilisation: float = 0.4
    """Share of the GPU's peak that the engine's prefill (prompts and observations) reaches."""
    decode_step_s: float = 0.006
    """Host time of one engine step that the GPU does not hide: scheduling, launches, sampling; seconds."""
    decode_sequence_s: float = 20e-6
    """Host time of one engine step per running trajectory, seconds."""
    collective_latency_s: float = 12e-6
    """Time of one small all-reduce in the engine, seconds; each step has two per layer."""
    tail_concurrency: float = 0.125
    """Mean share of trajectories that still run after those of mean length have ended."""
    answer_tokens: float = 16.0
    """Tokens of scaffold and gold answer, which are scored after every turn."""
    fixed_s: float = 5.0
    """Time per step for exchange, advantages, packing, records, and the engine's sleep and wake-up, seconds."""
    activation_ratio: float = 1.0
    """Actual activation memory of the layers, relative to the memory computed from their shapes."""
    context_gib: float = 3.0
    """Memory reserved on every rank for CUDA's context, NCCL's buffers and cuBLAS' workspaces of trainer and engine,
    GiB.

    The reserve also covers placeholders: Transformer Engine keeps a tensor for each shape of a layer's weights and
    returns it once the gradient is in the buffer (0.2 GiB for 72B on 8 tensor-parallel ranks).
    """
    fragmentation: float = 0.03
    """Memory reserved for fragmentation, as a share of all other memory on the GPU."""
