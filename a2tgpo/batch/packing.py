"""Pack trajectories end to end into one row of tokens.

A trajectory with tokens x_0 .. x_{n-1} becomes the inputs x_0 .. x_{m-1} and the targets x_1 .. x_m, where x_m is the
last token that the policy sampled. At position k the model has read `tokens[k]`, and `logprobs[k]` is log
p(`targets[k]`). Therefore `loss_mask`, `turn_ids` and `rollout_logprobs` at position k refer to `targets[k]`, not to
`tokens[k]`.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from a2tgpo.batch.expert_rows import ExpertShape
from a2tgpo.config.fp8 import Fp8Config
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.trajectory import Trajectory

PADDING = -1
"""Value of `sequence_ids` at positions that do not belong to a trajectory."""
NOT_SAMPLED = -1
"""The turn number that is given to every token that the policy did not sample."""


@dataclass(frozen=True, kw_only=True)
class TreeNode:
    """The positions [start, end) of a row, which attend to [prefix_start, prefix_end) and causally to each other.

    The prefix of a trunk is empty. The prefix of a branch is the beginning of a trunk.
    """

    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """One micro-batch. It has S trajectories, with U turns in all, in one row of T positions.

    Each trajectory is a segment of the row, and is padded at its end. The padding of the whole row is a further
    segment. All padding is masked.
    """

    tokens: Tensor
    """[1, T] int64, the token ids that the model reads."""
    positions: Tensor
    """[1, T] int64, the positions within each segment, counted from 0."""
    cu_seqlens: Tensor
    """[segments + 1] int32, the segments' boundaries from 0 to T. This tensor stays in host memory (see `to`)."""
    targets: Tensor
    """[1, T] int64, the token after each position. 0 at padded positions."""
    loss_mask: Tensor
    """[1, T] bool, True if the policy sampled the target."""
    turn_ids: Tensor
    """[1, T] int64 in [0, U), the number of the target's turn. 0 if `loss_mask` is False."""
    sequence_ids: Tensor
    """[1, T] int64 in [0, S), index of the trajectory within this micro-batch. PADDING at padded positions."""
    rollout_logprobs: Tensor
    """[1, T] float32, the engine's log-prob of the target, in nats. 0 if `loss_mask` is False."""
    trajectory_indices: tuple[int, ...]
    """[S], the index of each trajectory in the list that was passed to `pack`."""
    turn_trajectory: Tensor
    """[U] int64, the index of each turn's trajectory in the list that was passed to `pack`."""
    turn_index: Tensor
    """[U] int64, the index of each turn in its trajectory, counted from 0."""
    experts: Tensor | None = None
    """[T, layers, chosen] uint8 or int16, the experts that the engine chose for each of `tokens`. Positions without
    known experts, among them all padding, have `ExpertShape.no_expert`. None: no position has known experts. This
    tensor stays in host memory."""
    tree: tuple[TreeNode, ...] | None = None
    """The nodes that define the attention, see `probes`. None: attention is causal within each segment."""

    @property
    def num_tokens(self) -> int:
        """The number of positions T, including padding."""
        return self.tokens.size(1)

    @property
    def num_sequences(self) -> int:
        return len(self.trajectory_indices)

    @property
    def num_turns(self) -> int:
        return self.turn_index.numel()

    def to(self, device: torch.device) -> PackedBatch:
        """Return this batch with its tensors on `device`, except `cu_seqlens` and `experts`.

        The host reads `cu_seqlens` in every pass. Only a part of `experts` is needed on a device at a time.
        """
        if self.tokens.device == device:
            return self
        moved = {
            field.name: getattr(self, field.name).to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if field.name not in ("trajectory_indices", "tree", "cu_seqlens", "experts")
        }
        return dataclasses.replace(self, **moved)


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Multiples to which the lengths in a micro-batch are padded."""

    row: int = 1
    """The length T of the whole row is a multiple of this number."""
    segment: int = 1
    """The length of every segment with its padding is a multiple of this number."""

    def segment_length(self, length: int) -> int:
        """Return the number of positions that a trajectory of `length` positions has with its padding."""
        return length + -length % self.segment


def alignment(parallel: ParallelConfig, fp8: Fp8Config) -> Alignment:
    """Return the alignment that both the layout `parallel` and the number format `fp8` require.

    Context parallelism divides every segment into 2 x `context` equal pieces (see `context_split`). Sequence
    parallelism divides each rank's part of the row into `tensor` equal pieces. With FP8, the length of such a piece
    must be a multiple of `fp8.token_multiple`.
    """
    segment = 2 * parallel.context if parallel.context > 1 else 1
    piece = (parallel.tensor if parallel.sequence else 1) * fp8.token_multiple
    return Alignment(row=math.lcm(parallel.context * piece, segment), segment=segment)


def packed_length(trajectory: Trajectory) -> int:
    """Return how many positions a trajectory has in a micro-batch, without padding.

    This is the number of tokens before the last token that the policy sampled, or 0 if the policy sampled none.
    """
    turns = trajectory.turns
    while turns and not turns[-1].tokens:
        turns = turns[:-1]
    if not turns:
        return 0
    observed = sum(len(turn.observation_tokens) for turn in turns[:-1])
    return len(trajectory.prompt_tokens) + sum(len(turn.tokens) for turn in turns) + observed - 1


def pack(
    trajectories: Sequence[Trajectory],
    indices: Sequence[int],
    *,
    align: Alignment,
    expert_shape: ExpertShape | None = None,
) -> PackedBatch:
    """Pack `trajectories[i] for i in indices` end to end in this order.

    Trajectories without a sampled token and turns without tokens are left out. If no trajectory remains, the batch
    has `align.row` masked positions, and contributes nothing to the loss.

    Args:
        expert_shape: the shape of the trajectories' rows of experts. None: the batch gets no such rows.

    Raises:
        ValueError: if a prompt is empty, or if a turn has more or fewer `rollout_logprobs` than tokens.
        RuntimeError: if a trajectory has rows of experts, but not one for each position.
    """
    kept = [index for index in indices if trajectories[index].num_sampled_tokens]
    spans: list[
        tuple[Sequence[int], int]
    ] = []  # tokens, each with its turn's number in this batch, or NOT_SAMPLED
    logprobs: list[Sequence[float]] = []
    turn_trajectory: list[int] = []
    turn_index: list[int] = []
    for index in kept:
        trajectory = trajectories[index]
        _check(trajectory, index)
        spans.append((trajectory.prompt_tokens, NOT_SAMPLED))
        for number, turn in enumerate(trajectory.turns):
            if turn.tokens:
                spans.append((turn.tokens, len(turn_index)))
                logprobs.append(turn.rollout_logprobs)
                turn_trajectory.append(index)
                turn_index.append(number)
            spans.append((turn.observation_tokens, NOT_SAMPLED))
        while spans[-1][1] == NOT_SAMPLED:  # no token after the last sampled token is predicted
            spans.pop()
    # `read` has all sequences end to end, each up to its last target. A sequence has one more token than positions.
    read = _flat([tokens for tokens, _ in spans], np.int64)
    span_lengths = torch.tensor([len(tokens) for tokens, _ in spans], dtype=torch.int64)
    turns = torch.tensor([turn for _, turn in spans], dtype=torch.int64).repeat_interleave(span_lengths)
    read_logprobs = torch.zeros(len(read))
    read_logprobs[turns != NOT_SAMPLED] = _flat(logprobs, np.float32)

    lengths = [packed_length(trajectories[index]) for index in kept]
    segments = [align.segment_length(length) for length in lengths]
    num_padding = -sum(segments) % align.row if kept else align.row
    if num_padding:
        segments.append(num_padding)
    cu_seqlens = torch.tensor([0, *accumulate(segments)], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in segments])
    sequence = torch.arange(len(kept)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))  # [real]
    # For each position that is not padding: the index of its token in `read`, and the position in the row.
    source = torch.arange(len(sequence)) + sequence
    target = source + 1
    padding_before = torch.tensor([0, *accumulate(map(operator.sub, segments, lengths))], dtype=torch.int64)
    place = torch.arange(len(sequence)) + padding_before[sequence]

    def row_of(values: Tensor, fill: int = 0) -> Tensor:
        row = torch.full((1, len(positions)), fill, dtype=values.dtype)
        row[0, place] = values
        return row

    target_turns = turns[target]
    return PackedBatch(
        tokens=row_of(read[source]),
        positions=positions[None],
        cu_seqlens=cu_seqlens,
        targets=row_of(read[target]),
        loss_mask=row_of(target_turns != NOT_SAMPLED),
        turn_ids=row_of(target_turns.clamp(min=0)),
        sequence_ids=row_of(sequence, fill=PADDING),
        rollout_logprobs=row_of(read_logprobs[target]),
        experts=_experts([trajectories[index] for index in kept], expert_shape, place, len(positions)),
        trajectory_indices=tuple(kept),
        turn_trajectory=torch.tensor(turn_trajectory, dtype=torch.int64),
        turn_index=torch.tensor(turn_index, dtype=torch.int64),
    )


def _experts(
    trajectories: Sequence[Trajectory], shape: ExpertShape | None, place: Tensor, num_positions: int
) -> Tensor | None:
    """Return `PackedBatch.experts`. `place` lists the row's positions that are not padding."""
    if shape is None or not trajectories:
        return None
    rows = np.full((num_positions, shape.layers, shape.chosen), shape.no_expert, shape.dtype)
    first = 0
    for trajectory in trajectories:
        last = first + packed_length(trajectory)
        if content := trajectory.experts:
            if len(content) != (last - first) * shape.row_bytes:
                raise RuntimeError(
                    f"trajectory {trajectory.prompt_id}, sample {trajectory.sample_index}: "
                    f"{len(content) / shape.row_bytes:g} rows of experts for {last - first} positions"
                )
            rows[place[first:last].numpy()] = shape.decode(content)
        first = last
    return torch.from_numpy(rows)


def empty_batch(align: Alignment) -> PackedBatch:
    """Return a micro-batch without trajectories, for a rank that has fewer micro-batches than other ranks."""
    return pack([], [], align=align)


def _check(trajectory: Trajectory, index: int) -> None:
    """Raise a ValueError if `pack` must reject the trajectory."""
    where = f"trajectory {index} ({trajectory.prompt_id})"
    if not trajectory.prompt_tokens:
        raise ValueError(f"{where} has an empty prompt")
    for number, turn in enumerate(trajectory.turns):
        if len(turn.rollout_logprobs) != len(turn.tokens):
            raise ValueError(
                f"{where}, turn {number}: {len(turn.rollout_logprobs)} log-probs for "
                f"{len(turn.tokens)} sampled tokens"
            )


def _flat(lists: Sequence[Sequence[float]], dtype: type) -> Tensor:
    """Return the concatenation of all `lists`."""
    return torch.from_numpy(
        np.concatenate([np.empty(0, dtype), *(np.asarray(part, dtype) for part in lists)])
    )
