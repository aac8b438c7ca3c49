"""What a plan takes for granted: round figures, not fitted. `plan.published` says how far off the time model is.

Measurements on a card can replace most of them (`plan.measured`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    compute_utilisation: float = 0.45
    """Share of the card's peak that large matrix products and attention reach, launch gaps included."""
    fp8_speed: float = 1.5
    """Linear layers in FP8 against bfloat16, quantisation included; the card's peak is twice as high."""
    imbalance: float = 0.05
    """Time lost to replicas waiting for the one with the most tokens, as a share of computation."""
    memory_utilisation: float = 0.7
    """Share of the memory bandwidth that decoding and the optimizer reach."""
    link_utilisation: float = 0.7
    """Share of a link's bandwidth that collectives reach."""
    prefill_utilisation: float = 0.4
    """Share of the card's peak that the engine's prompts and observations reach."""
    decode_step_s: float = 0.006
    """Host time of one engine step, not hidden: scheduling, launches, sampling, seconds."""
    decode_sequence_s: float = 20e-6
    """Host time of one engine step per running trajectory, seconds."""
    collective_latency_s: float = 12e-6
    """One small all-reduce in the engine, seconds; two a layer and step."""
    tail_concurrency: float = 0.125
    """Share of the trajectories still running, on average, once those of mean length are done."""
    answer_tokens: float = 16.0
    """Scaffold and gold answer that the gain scores after every turn, tokens."""
    fixed_s: float = 5.0
    """Exchange, advantages, packing, records, waking and putting to sleep, seconds a step."""
    activation_ratio: float = 1.0
    """What a pass keeps and works with in the layers, against what is counted from their shapes."""
    context_gib: float = 3.0
    """Reserved on every rank for CUDA's context, NCCL's buffers and cuBLAS' workspaces of trainer and engine, GiB.

    Also for placeholders: Transformer Engine keeps a tensor for each shape of a layer's weights, which it returns
    once it has added a gradient to the buffer (0.2 GiB for 72B on 8 tensor-parallel ranks)."""
    fragmentation: float = 0.03
    """Reserved for fragmentation, as a share of all else on the card."""
