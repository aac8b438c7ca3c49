"""The parts that are on the GPU in each phase.

build: The trainer is built. The engine does not exist yet, or is asleep.
start: The engine is built.
bank: The weights are fingerprinted, to find rollouts of this step that an earlier start has finished.
refit: The engine gets the weights, and the trainer computes the log-probs of the probe.
rollout: The engine plays training and held-out questions.
score: The trainer and the reference compute log-probs.
update: The trainer runs forward and backward passes and the optimizer step.
checkpoint: The model and the optimizer are copied to host memory, or loaded.

A sleeping engine has lost its weights, so a refit precedes every rollout. Only a rollout can follow a refit.
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
    """Return which of the parts in `TRAINER` and `ENGINE` are on the GPU in `phase`.

    If `offload` is False, the whole trainer stays on the GPU in all phases.
    """
    return frozenset(_RESIDENT[phase] if offload else (*_RESIDENT[phase], *TRAINER))
