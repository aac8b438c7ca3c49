"""Division of a step's trajectories into mini-batches (one optimizer step each), and these into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from a2tgpo.advantage.turn_table import TurnAdvantages
from a2tgpo.batch.microbatches import pack_microbatches
from a2tgpo.batch.packing import Alignment, PackedBatch
from a2tgpo.config.run import RunConfig
from a2tgpo.loss.aggregate import token_weights
from a2tgpo.loss.policy_loss import LossInputs
from a2tgpo.loss.rollout_correction import ImportanceWeights
from a2tgpo.parallel.groups import ParallelGroups
from a2tgpo.trajectory import Trajectory


@dataclass(kw_only=True)
class Minibatch:
    """This rank's data for one optimizer step."""

    batches: list[PackedBatch]
    turn_advantages: list[torch.Tensor]
    """Per micro-batch [U] float32: advantage of each turn."""
    turn_clip_scales: list[torch.Tensor]
    """Per micro-batch [U] float32."""
    sequence_weights: list[torch.Tensor]
    """Per micro-batch [S] float32: weight of each sampled token of the sequence in the loss."""
    sequence_is_correct: list[torch.Tensor]
    """Per micro-batch [S] bool: the trajectory's answer matches exactly."""
    is_scored: bool = False
    """Whether `old_logprobs` exist before the update; equal on all ranks."""
    old_logprobs: dict[int, torch.Tensor] = field(default_factory=dict)
    """By micro-batch [T] float32, on the last pipeline stage: log-probs under the policy that played. Filled by
    scoring, or else by the training pass.
    """
    ref_logprobs: dict[int, torch.Tensor] = field(default_factory=dict)
    """By micro-batch [T] float32, on the last pipeline stage: log-probs under the reference; empty without a
    reference.
    """
    importance: dict[int, ImportanceWeights] = field(default_factory=dict)
    """By micro-batch, on the last pipeline stage: the weights of its sampled tokens. Filled by the update if a
    rollout correction is configured.
    """
    turn_ratios: dict[int, torch.Tensor] = field(default_factory=dict)
    """By micro-batch [U] float32, on the last pipeline stage: the turns' ratios, see `policy_update.turn_ratios`.
    Filled by the update.
    """

    def loss_inputs(self, index: int) -> LossInputs:
        """Return the loss's flat per-token inputs for micro-batch `index`, on the batch's device; last stage only."""
        batch, old = self.batches[index], self.old_logprobs[index]
        mask = batch.loss_mask[0]
        turn_ids, sequence_ids = batch.turn_ids[0, mask], batch.sequence_ids[0, mask]
        reference = self.ref_logprobs.get(index)
        importance = self.importance.get(index)
        return LossInputs(
            old_logprobs=old[mask],
            advantages=self.turn_advantages[index].to(mask.device)[turn_ids],
            clip_scale=self.turn_clip_scales[index].to(mask.device)[turn_ids],
            weights=self.sequence_weights[index].to(mask.device)[sequence_ids],
            turn_ids=turn_ids,
            sequence_ids=sequence_ids,
            num_turns=batch.num_turns,
            num_sequences=batch.num_sequences,
            ref_logprobs=None if reference is None else reference[mask],
            importance=None if importance is None else importance.weights,
        )


def build_minibatches(
    trajectories: Sequence[Trajectory],
    advantages: TurnAdvantages,
    clip_scales: torch.Tensor,
    *,
    config: RunConfig,
    groups: ParallelGroups,
    align: Alignment,
) -> list[Minibatch]:
    """Build mini-batches of `prompts_per_minibatch` prompts each, in prompt order.

    Every rank must call this, even without trajectories: loss normalisers are summed over the data-parallel group,
    and the replicas agree on the number of micro-batches (`pack_microbatches`).

    Args:
        trajectories: this data-parallel replica's share, rows of `advantages` and of `clip_scales` [N, T + 1].
        align: the policy's.
    """
    prompts = config.update.prompts_per_minibatch
    is_correct = torch.tensor([t.exact_match == 1 for t in trajectories], dtype=torch.bool)
    minibatches = []
    for number in range(config.rollout.prompts_per_step // prompts):
        rows = [i for i, t in enumerate(trajectories) if t.prompt_index // prompts == number]
        counts = torch.tensor([trajectories[i].num_sampled_tokens for i in rows], dtype=torch.int64)
        weights = torch.zeros(len(trajectories), dtype=torch.float64)
        weights[rows] = token_weights(
            counts,
            aggregation=config.algorithm.aggregation,
            norm_length=config.rollout.max_response_tokens,
            dp_group=groups.dp_group,
        )
        minibatch = Minibatch(
            batches=[], turn_advantages=[], turn_clip_scales=[], sequence_weights=[], sequence_is_correct=[]
        )
        limit = config.update.max_microbatch_tokens
        for batch in pack_microbatches(
            trajectories, rows, max_tokens=limit, align=align, dp_group=groups.dp_group
        ):
            turns = batch.turn_trajectory, batch.turn_index
            minibatch.batches.append(batch)
            minibatch.turn_advantages.append(advantages.advantages[turns].float())
            minibatch.turn_clip_scales.append(clip_scales[turns].float())
            minibatch.sequence_weights.append(weights[list(batch.trajectory_indices)].float())
            minibatch.sequence_is_correct.append(is_correct[list(batch.trajectory_indices)])
        minibatches.append(minibatch)
    return minibatches
