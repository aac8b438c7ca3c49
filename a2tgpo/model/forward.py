"""Run a model chunk on a packed batch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_model_config

from a2tgpo.batch.context_split import context_positions
from a2tgpo.batch.packing import TreeNode
from a2tgpo.model.output_head import output_at
from a2tgpo.model.policy import unwrapped
from a2tgpo.model.tree_attention import attending_along


def forward_packed(
    chunk: Any,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    tree: Sequence[TreeNode] | None = None,
    output_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run a chunk of this stage on a row of packed sequences. Each sequence attends only to itself.

    All ranks of a data-parallel replica must call this with the same batch. With several pipeline stages, Megatron's
    schedule must call this, because the schedule gives each chunk the output of the previous chunk. With context
    parallelism, the batch must have the padding of `packing.alignment`. A rank then runs only its own positions of
    the batch (see `context_split.context_positions`). Tokens after `cu_seqlens[-1]` form an additional segment. Do
    not call this under `torch.inference_mode`, because training cannot use the rotary tables that Megatron would then
    cache.

    Args:
        tokens: [1, T] int64, T >= 1, on any device.
        positions: [1, T] int64, on any device. Used only with `tree`. Without a tree, positions count from the
            segment's start.
        cu_seqlens: [S + 1] integers from 0 to at most T, in ascending order. Segment i begins at cu_seqlens[i] and
            ends before cu_seqlens[i + 1]. Use host memory, because reading the values from a GPU would synchronise.
        tree: the tree that the row's only segment forms (see `probes`). None: no tree. A tree is allowed only without
            gradients and without context parallelism.
        output_rows: [n] int64, n >= 1: indices of this rank's positions that need logits, equal on all
            tensor-parallel ranks. None: all positions need logits.

    Returns:
        From the last chunk, logits [n or T / cp, padded vocabulary / tp] in the model's dtype. From any other chunk,
        hidden states [T / cp, 1, hidden]. Sequence parallelism pads their first dimension and divides it by tp.
    """
    assert not torch.is_inference_mode_enabled(), "use torch.no_grad(), not torch.inference_mode()"
    config = get_model_config(chunk)
    model = unwrapped(chunk)
    device = next(model.parameters()).device
    cp_group = model.pg_collection.cp
    multiple = config.tensor_model_parallel_size if config.sequence_parallel else 1
    if cp_group.size() > 1:
        assert tree is None, "context-parallel ranks cannot divide a tree"
        total = tokens.size(1)
        assert int(cu_seqlens[-1]) == total and total % (cp_group.size() * multiple) == 0, (
            f"context parallelism needs aligned segments that cover the row of {total} tokens"
        )
        mine = context_positions(cu_seqlens, cp_group.size())[cp_group.rank()].to(tokens.device)
        tokens, positions = tokens[:, mine], positions[:, mine]
    num_tokens = tokens.size(1)
    padding = -num_tokens % multiple
    positions = F.pad(positions, (0, padding)).to(device, non_blocking=True)
    with contextlib.ExitStack() as adapted:
        if tree is not None:
            adapted.enter_context(attending_along(chunk, tree, positions))
        if output_rows is not None and model.post_process:
            adapted.enter_context(output_at(model, output_rows.to(device, non_blocking=True)))
        output = chunk(
            input_ids=F.pad(tokens, (0, padding)).to(device, non_blocking=True),
            position_ids=positions,
            attention_mask=None,
            packed_seq_params=_packed_seq_params(cu_seqlens, num_tokens + padding, cp_group.size(), device),
            # Float16Module would convert all logits of the last stage to float32 at once.
            **({"fp32_output": False} if config.bf16 else {}),
        )
    return output[0, :num_tokens] if model.post_process else output


def _packed_seq_params(
    cu_seqlens: torch.Tensor, tokens_per_rank: int, cp_size: int, device: torch.device
) -> PackedSeqParams:
    """Return segments for the tokens of all context-parallel ranks. Tokens in no segment form a last segment."""
    num_tokens = cp_size * tokens_per_rank
    boundaries = cu_seqlens.tolist()
    assert boundaries[0] == 0 and boundaries[-1] <= num_tokens, (
        f"segments {boundaries} of {num_tokens} tokens"
    )
    if boundaries[-1] < num_tokens:
        boundaries.append(num_tokens)
    # The length of the longest segment must be exact. If it were the length of the packed row, Megatron would not
    # restart the rotary positions at each segment (megatron/core/models/common/embeddings/rope_utils.py:212).
    longest = max(end - start for start, end in pairwise(boundaries))
    segments = torch.tensor(boundaries, dtype=torch.int32).to(device, non_blocking=True)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=segments,
        cu_seqlens_kv=segments,
        # Context parallelism requires these fields. The kernels treat a segment's padding as part of the segment.
        cu_seqlens_q_padded=segments if cp_size > 1 else None,
        cu_seqlens_kv_padded=segments if cp_size > 1 else None,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
