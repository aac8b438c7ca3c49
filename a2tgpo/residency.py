"""What is on the card in each phase of a run: the one table that the run moves by and `plan/` counts by.

    build       the trainer as it is built, the engine not there yet or asleep
    start       the engine as it is built
    bank        finished rollouts are looked for, which are known by a fingerprint of the weights
    refit       the engine gets the weights; the trainer scores the probe
    rollout     the engine plays: training and held-out questions
    score       log-probs by the trainer, and by the reference
    update      forward, backward, optimizer step
    checkpoint  model and optimizer are copied to host memory, or loaded

An engine that sleeps has lost its weights: it gets them in the refit, which only a rollout can follow.
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
    """The parts, of `TRAINER` and `ENGINE`, that are on the card in `phase`.

    Args:
        offload: `update.offload`; without it all of the trainer stays, in all phases.
    """
    return frozenset(_RESIDENT[phase] if offload else (*_RESIDENT[phase], *TRAINER))
