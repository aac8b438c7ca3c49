"""Trajectories laid end to end in one row of tokens, every field aligned on the predicting position.

A trajectory with tokens x_0 .. x_{n-1} becomes the inputs x_0 .. x_{m-1} and the targets x_1 .. x_m, where
x_m is the last token the policy sampled: nothing after it is ever predicted, so a closing observation is not
run. At position k the model has read `tokens[k]` and `logprobs[k]` is log p(`targets[k]`), so `loss_mask`,
`turn_ids` and `rollout_logprobs` speak of `targets[k]`, not of `tokens[k]`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor

from a2tgpo.batch.tree import TreeNode
from a2tgpo.config.fp8 import Fp8Config
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.trajectory import Trajectory

PADDING = -1
"""`sequence_ids` of positions that belong to no trajectory."""


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """One micro-batch: S trajectories in one row of T positions, U turns.

    Positions that only fill a segment up to the alignment are at its end, where no other position attends to them;
    those that fill the row form one last segment of their own. They are masked everywhere.
    """

    tokens: Tensor
    """[1, T] int64, what the model reads."""
    positions: Tensor
    """[1, T] int64, 0 at the start of every segment."""
    cu_seqlens: Tensor
    """[segments + 1] int32, where segments begin and end; the last entry is T."""
    targets: Tensor
    """[1, T] int64, the token that follows; 0 on padding."""
    loss_mask: Tensor
    """[1, T] bool, True where the target's log-prob is asked for: where the policy sampled it."""
    turn_ids: Tensor
    """[1, T] int64 in [0, U), the turn that the target belongs to; 0 where masked."""
    sequence_ids: Tensor
    """[1, T] int64 in [0, S), the trajectory in this micro-batch; PADDING on padding."""
    rollout_logprobs: Tensor
    """[1, T] float32, the engine's log p of the target, nats; 0 where masked."""
    trajectory_indices: tuple[int, ...]
    """[S], where the trajectories stand in the list they were packed from."""
    turn_trajectory: Tensor
    """[U] int64, the turn's trajectory as an index into that same list."""
    turn_index: Tensor
    """[U] int64, 0-based place of the turn in its trajectory."""
    tree: tuple[TreeNode, ...] | None = None
    """Who attends to whom, where it is not everyone to those before it in its segment; see `probes`."""

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return self.tokens.size(1)

    @property
    def num_sequences(self) -> int:
        return len(self.trajectory_indices)

    @property
    def num_turns(self) -> int:
        return self.turn_index.numel()

    @property
    def max_seqlen(self) -> int:
        """Length of the longest segment, tokens."""
        return int(self.cu_seqlens.diff().max())

    def expand_turns(self, values: Tensor) -> Tensor:
        """Per-turn values put on the positions that predict the turn's tokens.

        Args:
            values: [U, ...] on the batch's device.

        Returns:
            [T, ...] of the same dtype; 0 where `loss_mask` is False.
        """
        assert values.size(0) == self.num_turns, (
            f"{values.size(0)} values for {self.num_turns} turns: one value per turn of this micro-batch"
        )
        mask = self.loss_mask[0]
        out = values.new_zeros(self.num_tokens, *values.shape[1:])
        out[mask] = values[self.turn_ids[0, mask]]
        return out

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch with all tensors on `device`; itself where they are there already."""
        if self.tokens.device == device:
            return self
        moved = {
            field.name: getattr(self, field.name).to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if field.name not in ("trajectory_indices", "tree")
        }
        return dataclasses.replace(self, **moved)


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """What lengths in a micro-batch must be multiples of."""

    row: int = 1
    """The whole row, T."""
    segment: int = 1
    """Every segment: a trajectory's positions and the padding behind them."""

    def segment_length(self, length: int) -> int:
        """Positions that a trajectory of `length` takes in the row."""
        return length + -length % self.segment


def alignment(parallel: ParallelConfig, fp8: Fp8Config) -> Alignment:
    """The rules of the layout and the number format, all of them.

    Context parallelism deals 2 x `context` equal pieces of every segment out (see `context_split`); sequence
    parallelism cuts what a rank then has of the row into `tensor` equal pieces; FP8 takes pieces of certain lengths.
    """
    segment = 2 * parallel.context if parallel.context > 1 else 1
    piece = (parallel.tensor if parallel.sequence else 1) * fp8.token_multiple
    return Alignment(row=math.lcm(parallel.context * piece, segment), segment=segment)


def packed_length(trajectory: Trajectory) -> int:
    """Positions a trajectory takes in a micro-batch: all before its last sampled token; 0 without one."""
    turns = trajectory.turns
    while turns and not turns[-1].tokens:
        turns = turns[:-1]
    if not turns:
        return 0
    observed = sum(len(turn.observation_tokens) for turn in turns[:-1])
    return len(trajectory.prompt_tokens) + sum(len(turn.tokens) for turn in turns) + observed - 1


def pack(trajectories: Sequence[Trajectory], indices: Sequence[int], *, align: Alignment) -> PackedBatch:
    """Lay `trajectories[i] for i in indices` end to end, in that order.

    A trajectory without a sampled token has nothing to teach and is left out, as is a turn without tokens.
    With nothing left the batch is `align.row` masked positions: the model can run it, and it adds nothing.

    Args:
        trajectories: the list that `indices`, `trajectory_indices` and `turn_trajectory` point into.
        align: segments and T are rounded up to multiples; see `alignment`.

    Raises:
        ValueError: if a trajectory has an empty prompt (its first token has no predicting position) or a turn
            whose `rollout_logprobs` do not match its tokens.
    """
    rows = [
        _Row(trajectories[index], index, align) for index in indices if trajectories[index].num_sampled_tokens
    ]
    lengths = [len(row.tokens) for row in rows]
    num_padding = -sum(lengths) % align.row if rows else align.row
    padding = [0] * num_padding
    segments = [*lengths, num_padding] if num_padding else lengths

    num_turns = list(accumulate((len(row.turn_index) for row in rows), initial=0))
    turn_ids = [
        [first + turn if turn >= 0 else 0 for turn in row.local_turns]
        for first, row in zip(num_turns, rows, strict=False)
    ]

    def row_of(parts: list[list], fill: list, dtype: torch.dtype) -> Tensor:
        return torch.tensor([*chain.from_iterable(parts), *fill], dtype=dtype)[None]  # [1, T]

    masks = [[turn >= 0 for turn in row.local_turns] for row in rows]
    sequence_ids = [
        [number] * row.num_real + [PADDING] * (length - row.num_real)
        for number, (row, length) in enumerate(zip(rows, lengths, strict=True))
    ]
    return PackedBatch(
        tokens=row_of([row.tokens for row in rows], padding, torch.int64),
        positions=torch.cat([torch.arange(length) for length in segments])[None],
        cu_seqlens=torch.tensor(list(accumulate(segments, initial=0)), dtype=torch.int32),
        targets=row_of([row.targets for row in rows], padding, torch.int64),
        loss_mask=row_of(masks, padding, torch.bool),
        turn_ids=row_of(turn_ids, padding, torch.int64),
        sequence_ids=row_of(sequence_ids, [PADDING] * num_padding, torch.int64),
        rollout_logprobs=row_of([row.rollout_logprobs for row in rows], padding, torch.float32),
        trajectory_indices=tuple(row.index for row in rows),
        turn_trajectory=torch.tensor([row.index for row in rows for _ in row.turn_index], dtype=torch.int64),
        turn_index=torch.tensor([turn for row in rows for turn in row.turn_index], dtype=torch.int64),
    )


def empty_batch(align: Alignment) -> PackedBatch:
    """A micro-batch without trajectories, for ranks that must keep step with others that still have some."""
    return pack([], [], align=align)


class _Row:
    """One trajectory's fields over its predicting positions and the padding behind, as lists of equal length."""

    def __init__(self, trajectory: Trajectory, index: int, align: Alignment) -> None:
        if not trajectory.prompt_tokens:
            raise ValueError(f"trajectory {index} ({trajectory.prompt_id}) has an empty prompt")
        self.index = index
        sequence = list(trajectory.prompt_tokens)
        local_turns = [-1] * len(
            sequence
        )  # for each token: its turn among those with tokens, -1: not sampled
        logprobs = [0.0] * len(sequence)
        self.turn_index: list[int] = []
        for number, turn in enumerate(trajectory.turns):
            if len(turn.rollout_logprobs) != len(turn.tokens):
                raise ValueError(
                    f"trajectory {index} ({trajectory.prompt_id}), turn {number}: "
                    f"{len(turn.rollout_logprobs)} log-probs for {len(turn.tokens)} sampled tokens"
                )
            if turn.tokens:
                local_turns += [len(self.turn_index)] * len(turn.tokens)
                self.turn_index.append(number)
            sequence += turn.tokens
            logprobs += turn.rollout_logprobs
            sequence += turn.observation_tokens
            local_turns += [-1] * len(turn.observation_tokens)
            logprobs += [0.0] * len(turn.observation_tokens)
        length = self.num_real = packed_length(trajectory)
        num_padding = align.segment_length(length) - length
        padding = [0] * num_padding
        self.tokens = sequence[:length] + padding
        self.targets = sequence[1 : length + 1] + padding
        self.local_turns = local_turns[1 : length + 1] + [-1] * num_padding
        self.rollout_logprobs = logprobs[1 : length + 1] + [0.0] * num_padding
