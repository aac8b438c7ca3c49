"""Divide a step's trajectories into mini-batches, one per optimizer step, and each mini-batch into micro-batches."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from a2tgpo.advantage.turn_table import TurnAdvantages
from a2tgpo.batch.expert_rows import ExpertShape
from a2tgpo.batch.microbatches import pack_microbatches
from a2tgpo.batch.packing import Alignment, PackedBatch, pack
from a2tgpo.config.run import RunConfig
from a2tgpo.loss.aggregate import token_weights
from a2tgpo.loss.clip_cov import clip_covariance
from a2tgpo.loss.inputs import LossInputs
from a2tgpo.parallel.groups import ParallelGroups
from a2tgpo.trajectory import TokenIds, Trajectory


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """S trajectories with U turns in total, in one row of T positions, and the inputs of their loss."""

    batch: PackedBatch
    turn_advantages: Tensor
    """[U] float32."""
    turn_clip_scales: Tensor
    """[U] float32."""
    sequence_weights: Tensor
    """[S] float32: the weight that each sampled token of the sequence has in the loss."""
    sequence_is_correct: Tensor
    """[S] bool: whether the trajectory's answer is an exact match."""
    token_offsets: Tensor | None = None
    """[T] float32: `TurnAdvantages.token_offsets` of the batch's tokens. None: all tokens of a turn have the same
    advantage."""
    is_cov_clipped: Tensor | None = None
    """[T] bool: tokens that Clip-Cov chose. None: Clip-Cov is off."""
    old_logprobs: Tensor | None = None
    """[T] float32: log-probs under the policy that played. Only the last pipeline stage has them, after scoring."""
    ref_logprobs: Tensor | None = None
    """[T] float32: log-probs under the reference. Only the last pipeline stage has them, after scoring."""
    contrast: PackedBatch | None = None
    """The same trajectories in the same order, after contrast prompts. None: the run has no contrast prompts."""
    contrast_logprobs: Tensor | None = None
    """[n] float32: log-probs of the n sampled tokens of `contrast`. Only the last pipeline stage has them."""

    def to(self, device: torch.device) -> Microbatch:
        """Return a copy of the micro-batch whose tensors are on `device` (see `PackedBatch.to`)."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved = {name: value.to(device) for name, value in values.items() if value is not None}
        return dataclasses.replace(self, **moved)

    def token_advantages(self) -> Tensor:
        """Return the advantage of each sampled token, [n]."""
        mask = self.batch.loss_mask[0]
        of_turns = self.turn_advantages[self.batch.turn_ids[0, mask]]
        return of_turns if self.token_offsets is None else of_turns + self.token_offsets[mask]

    def loss_inputs(self) -> LossInputs:
        """Return the loss's flat per-token inputs, without importance weights. Call this only on the last stage."""
        batch, mask = self.batch, self.batch.loss_mask[0]
        assert self.old_logprobs is not None, "old log-probs come first"
        turn_ids, sequence_ids = batch.turn_ids[0, mask], batch.sequence_ids[0, mask]
        return LossInputs(
            old_logprobs=self.old_logprobs[mask],
            advantages=self.token_advantages(),
            clip_scale=self.turn_clip_scales[turn_ids],
            weights=self.sequence_weights[sequence_ids],
            turn_ids=turn_ids,
            sequence_ids=sequence_ids,
            num_turns=batch.num_turns,
            num_sequences=batch.num_sequences,
            ref_logprobs=None if self.ref_logprobs is None else self.ref_logprobs[mask],
            is_cov_clipped=None if self.is_cov_clipped is None else self.is_cov_clipped[mask],
            contrast_logprobs=self.contrast_logprobs,
        )


Minibatch = Sequence[Microbatch]
"""The data of this rank for one optimizer step."""


def build_minibatches(
    trajectories: Sequence[Trajectory],
    advantages: TurnAdvantages,
    clip_scales: Tensor,
    *,
    config: RunConfig,
    groups: ParallelGroups,
    align: Alignment,
    contrast_prompts: Mapping[str, Sequence[int]] | None = None,
    expert_shape: ExpertShape | None = None,
) -> list[Minibatch]:
    """Build mini-batches of `prompts_per_minibatch` prompts each, in the order of prompts.

    Every rank must call this, because loss normalisers are summed over the data-parallel group. `trajectories` is
    this data-parallel replica's share of the step's trajectories. Trajectory i has row i of `advantages` and
    `clip_scales`.

    Args:
        contrast_prompts: the token ids of the contrast prompt of each question, by the question's id. None: the run
            has no contrast prompts.
        expert_shape: the shape of each token's row of expert ids. None: the policy replays no experts.
    """
    prompts = config.update.prompts_per_minibatch
    is_correct = torch.tensor([t.exact_match == 1 for t in trajectories], dtype=torch.bool)

    def microbatch_of(batch: PackedBatch) -> Microbatch:
        turns, sequences = (batch.turn_trajectory, batch.turn_index), list(batch.trajectory_indices)
        return Microbatch(
            batch=batch,
            turn_advantages=advantages.advantages[turns].float(),
            turn_clip_scales=clip_scales[turns].float(),
            sequence_weights=weights[sequences].float(),
            sequence_is_correct=is_correct[sequences],
            token_offsets=_laid_out(advantages.token_offsets, batch),
            # A contrast prompt may be longer than the prompt, so the row may be longer than `max_microbatch_tokens`.
            # Its pass needs less memory than the training pass, because it computes no gradients.
            contrast=pack(contrasted, sequences, align=align) if contrasted else None,
        )

    contrasted = with_prompts(trajectories, contrast_prompts) if contrast_prompts is not None else []
    weights = torch.zeros(len(trajectories), dtype=torch.float64)
    minibatches: list[Minibatch] = []
    for number in range(config.rollout.prompts_per_step // prompts):
        rows = [i for i, t in enumerate(trajectories) if t.prompt_index // prompts == number]
        counts = torch.tensor([trajectories[i].num_sampled_tokens for i in rows], dtype=torch.int64)
        weights[rows] = token_weights(
            counts,
            aggregation=config.algorithm.aggregation,
            norm_length=config.rollout.max_response_tokens,
            dp_group=groups.dp_group,
        )
        limit = config.update.max_microbatch_tokens
        packed = pack_microbatches(
            trajectories,
            rows,
            max_tokens=limit,
            align=align,
            dp_group=groups.dp_group,
            expert_shape=expert_shape,
        )
        microbatches = [microbatch_of(batch) for batch in packed]
        if config.algorithm.clip_cov_share:
            microbatches = _with_clip_cov(microbatches, trajectories, config=config, groups=groups)
        minibatches.append(microbatches)
    return minibatches


def with_prompts(
    trajectories: Sequence[Trajectory], prompts: Mapping[str, Sequence[int]]
) -> list[Trajectory]:
    """Return copies of the trajectories with `prompts[prompt_id]` in place of their own prompts."""
    return [dataclasses.replace(t, prompt_tokens=TokenIds(prompts[t.prompt_id])) for t in trajectories]


def _laid_out(offsets: Sequence[Tensor] | None, batch: PackedBatch) -> Tensor | None:
    """Return the `offsets` of the batch's trajectories at the positions of their tokens, [T] float32, 0 elsewhere."""
    if offsets is None:
        return None
    row = torch.zeros(batch.num_tokens)
    row[batch.loss_mask[0]] = torch.cat(
        [torch.zeros(0), *(offsets[i] for i in batch.trajectory_indices)]
    ).float()
    return row


def _with_clip_cov(
    microbatches: list[Microbatch],
    trajectories: Sequence[Trajectory],
    *,
    config: RunConfig,
    groups: ParallelGroups,
) -> list[Microbatch]:
    """Return the micro-batches of one mini-batch with `is_cov_clipped`, which is computed from the engine's
    log-probs."""

    def sampled(values: Sequence[Tensor]) -> Tensor:
        chosen = [value[m.batch.loss_mask[0]] for m, value in zip(microbatches, values, strict=True)]
        return torch.cat(chosen or [torch.zeros(0)])

    is_clipped = clip_covariance(
        sampled([m.batch.rollout_logprobs[0] for m in microbatches]),
        torch.cat([torch.zeros(0), *(m.token_advantages() for m in microbatches)]),
        sampled([_draws(m.batch, trajectories, seed=config.run.seed) for m in microbatches]),
        config=config.algorithm,
        dp_group=groups.dp_group,
    )
    counts = [int(m.batch.loss_mask.sum()) for m in microbatches]
    found = []
    for microbatch, own in zip(microbatches, is_clipped.split(counts), strict=True):
        row = torch.zeros(microbatch.batch.num_tokens, dtype=torch.bool)
        row[microbatch.batch.loss_mask[0]] = own
        found.append(dataclasses.replace(microbatch, is_cov_clipped=row))
    return found


def _draws(batch: PackedBatch, trajectories: Sequence[Trajectory], *, seed: int) -> Tensor:
    """Return a random number in [0, 1) for each position, [T] float64.

    A number depends only on the seed, on the trajectory and on the position in the trajectory.
    """
    draws = torch.zeros(batch.num_tokens, dtype=torch.float64)
    for number, index in enumerate(batch.trajectory_indices):
        trajectory = trajectories[index]
        key = (
            zlib.crc32(trajectory.prompt_id.encode()),
            trajectory.prompt_index,
            trajectory.sample_index,
            trajectory.turns[-1].version,
        )
        own = batch.sequence_ids[0] == number
        draws[own] = torch.from_numpy(np.random.default_rng([seed, *key]).random(int(own.sum())))
    return draws
