"""Check after every refit that the engine computes with the trainer's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from a2tgpo.parallel.collectives import all_reduce_max
from a2tgpo.trajectory import LogProbs, TokenIds, Trajectory, Turn

if TYPE_CHECKING:
    from a2tgpo.rollout.vllm_engine import VllmEngine

TOLERANCES = {"float32": 1e-3, "bfloat16": 0.15, "fp8": 0.8}
"""Largest allowed mean |difference| per probe token, in nats, for each number format. If engine and trainer have
different formats, the larger value applies. FP8 alone changes the probe's log-probs by 0.4 nats on average in a model
of 135M parameters (docs/fp8.md)."""


@dataclass(frozen=True, kw_only=True)
class ProbeGap:
    """Differences |log-prob in the engine - log-prob in the trainer| over the probe, in nats, on the worst rank."""

    mean: float
    max: float


def probe_tokens(num_token_ids: int, length: int) -> list[int]:
    """Return a fixed sequence of `length` ids below `num_token_ids`. The ids are spread over the vocabulary."""
    state, tokens = 1, []
    for _ in range(length):
        state = (6364136223846793005 * state + 1442695040888963407) % 2**64  # Knuth's MMIX generator
        tokens.append((state >> 33) % num_token_ids)
    return tokens


def probe_trajectory(probe: Sequence[int]) -> Trajectory:
    """Return the probe as a trajectory that the trainer can pack and score. The first token is the prompt."""
    sampled = TokenIds(probe[1:])
    return Trajectory(
        prompt_index=0,
        prompt_id="probe",
        sample_index=0,
        prompt_tokens=TokenIds(probe[:1]),
        turns=[Turn(tokens=sampled, rollout_logprobs=LogProbs([0.0] * len(sampled)))],
        stop_reason="probe",
    )


def probe_tolerance(configured: float, *, trainer_dtype: str, engine_dtype: str) -> float:
    """Return the setting `configured`. If it is 0, return the default of the less exact number format."""
    return configured or max(TOLERANCES[trainer_dtype], TOLERANCES[engine_dtype])


def verify_refit(
    engine: VllmEngine,
    probe: Sequence[int],
    trainer_logprobs: torch.Tensor,
    *,
    version: int,
    tolerance: float,
    group: dist.ProcessGroup | None,
) -> ProbeGap:
    """Compare the engine's log-probs of the probe with the trainer's log-probs. Every rank of `group` must call this.

    The engine must be idle and awake.

    Args:
        probe: a sequence from `probe_tokens`, the same on all ranks.
        trainer_logprobs: [len(probe) - 1] float: log p of probe[1:] by the trainer at temperature 1, in nats.
        version: the version of the weights, for the error message.
        tolerance: the largest allowed mean |difference|, in nats.
        group: the ranks that all raise an error if one of them finds too large a difference. None: this rank alone.

    Raises:
        RuntimeError: with a one-line message on all ranks of `group`, if the mean difference exceeds `tolerance`, or
            if the trainer's log-probs are not finite.
    """
    engine_logprobs = torch.tensor(engine.sequence_logprobs(probe), dtype=torch.float64)
    expected = trainer_logprobs.detach().to("cpu", torch.float64).flatten()
    assert engine_logprobs.shape == expected.shape, (
        f"{len(probe)} probe tokens need {len(probe) - 1} log-probs"
    )
    difference = (engine_logprobs - expected).abs().nan_to_num(nan=torch.inf)
    is_broken = (~expected.isfinite()).any().double()
    worst = torch.stack([difference.mean(), difference.max(), is_broken])
    if group is not None:
        worst = all_reduce_max(worst, group)
    gap = ProbeGap(mean=worst[0].item(), max=worst[1].item())
    if worst[2]:
        raise RuntimeError(
            f"refit after step {version}: the trainer's own log-probs of the probe are not finite, so its weights "
            "are "
            + (
                "broken; continue from an earlier checkpoint with a lower update.lr"
                if version
                else "broken on disk: NaN or infinity in the safetensors of model.path; export them again"
            )
        )
    if gap.mean > tolerance:
        raise RuntimeError(
            f"refit after step {version}: the engine's log-probs of the probe differ from the trainer's by "
            f"{gap.mean:.3g} in the mean and {gap.max:.3g} at most (nats); allowed mean: {tolerance:g} "
            "(refit.probe_tolerance). The engine does not have the trained weights; the run stops"
        )
    return gap
