"""What is on the GPU in each phase of a run: one table, used both by the run and by the estimates of `plan/`.

    build       trainer being built; engine absent or asleep
    start       engine being built
    bank        look up this step in the rollout bank; needs the weights, to fingerprint them
    refit       the engine gets the weights; the trainer scores the probe
    rollout     the engine plays training and held-out questions
    score       log-probs by the trainer and by the reference
    update      forward, backward, optimizer step
    checkpoint  model and optimizer are copied to host memory, or loaded

A sleeping engine has lost its weights. The refit brings new weights, and only a rollout can follow a refit.
"""

from __future__ import annotations

TRAINER = ("weights", "gradients", "optimizer", "reference")
ENGINE = ("engine weights", "KV cache")

_RESIDENT: dict[str, tuple[str, ...]] = {
    "build": ("weights", "gradients", "optimizer", "reference"),
    "start": ("engine weights", "KV cache"),
    "bank": ("weights",),
    "refit": ("weights", "engine weights"),
    "rollout": ("engine weights", "KV cache"),
    "score": ("weights", "reference"),
    "update": ("weights", "gradients", "optimizer"),
    "checkpoint": ("weights", "optimizer"),
}
PHASES = tuple(_RESIDENT)


def resident(phase: str, *, offload: bool) -> frozenset[str]:
    """Return the parts, of `TRAINER` and `ENGINE`, that are on the GPU in `phase`.

    Args:
        offload: `update.offload`; without it, the whole trainer stays on the GPU in all phases.
    """
    return frozenset(_RESIDENT[phase] if offload else (*_RESIDENT[phase], *TRAINER))
