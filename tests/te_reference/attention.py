"""Rotary embedding and attention over packed rows [tokens, heads, head_dim]. `cu_seqlens` gives the segments."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch

__all__ = [
    "convert_bshd_to_thd",
    "convert_thd_to_bshd",
    "fused_attn_bwd",
    "fused_attn_fwd",
    "fused_rope_backward",
    "fused_rope_forward",
    "get_cudnn_version",
    "get_fused_attn_backend",
]


def get_cudnn_version() -> int:
    return 92000  # cuDNN 9.20, the version of torch 2.13


def get_fused_attn_backend(parameters: Any) -> tuple[int, str]:
    """Return cuDNN's attention, and no reason against it. The real function would ask cuDNN whether it accepts the
    shapes.
    """
    return 1, ""


# -- rotary embedding ----------------------------------------------------------------------------------------


def fused_rope_forward(
    x: torch.Tensor,
    freqs: torch.Tensor,
    start_positions: Any,
    qkv_format: Any,
    interleaved: bool,
    cu_seqlens: torch.Tensor,
    cp_size: int,
    cp_rank: int,
) -> torch.Tensor:
    """Return x cos + rotate_half(x) sin, with the angle of each token's position in its segment."""
    assert not interleaved and start_positions is None and x.dim() == 3
    cos, sin = _tables(freqs, cu_seqlens, cp_size, cp_rank)
    turned, rest = x.detach().float().split([freqs.size(-1), x.size(-1) - freqs.size(-1)], -1)
    return torch.cat((turned * cos + _rotate_half(turned) * sin, rest), -1).to(x.dtype)


def fused_rope_backward(
    gradient: torch.Tensor,
    freqs: torch.Tensor,
    start_positions: Any,
    qkv_format: Any,
    interleaved: bool,
    cu_seqlens: torch.Tensor,
    cp_size: int,
    cp_rank: int,
) -> torch.Tensor:
    """Return the gradient rotated back, which is the transpose of the forward pass."""
    cos, sin = _tables(freqs, cu_seqlens, cp_size, cp_rank)
    turned, rest = gradient.float().split([freqs.size(-1), gradient.size(-1) - freqs.size(-1)], -1)
    return torch.cat((turned * cos - _rotate_half(turned * sin), rest), -1).to(gradient.dtype)


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def _tables(
    freqs: torch.Tensor, cu_seqlens: torch.Tensor, cp_size: int, cp_rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin [own tokens, 1, width]. A context-parallel rank has two pieces of each segment."""
    places = []
    for length in cu_seqlens.diff().tolist():
        if cp_size == 1:
            places.append(torch.arange(length))
        else:
            piece = length // cp_size // 2
            places.append(torch.arange(piece) + cp_rank * piece)
            places.append(torch.arange(piece) + length - (cp_rank + 1) * piece)
    place = torch.cat(places)
    assert place.numel() == 0 or int(place.max()) < freqs.size(0), "the rotary table is too short"
    angles = freqs[:, 0, 0, :].float()[place]
    return angles.cos()[:, None], angles.sin()[:, None]


# -- attention -----------------------------------------------------------------------------------------------


def fused_attn_fwd(
    max_q: int,
    max_kv: int,
    is_training: bool,
    scale: float,
    dropout: float,
    zero_fill: bool,
    qkv_layout: Any,
    o_format: Any,
    scale_inv_format: Any,
    bias_type: Any,
    mask_type: Any,
    softmax_type: Any,
    window: Any,
    bottom_right: bool,
    cu_q: torch.Tensor,
    cu_kv: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    fake_dtype: Any,
    cu_q_padded: torch.Tensor | None,
    cu_kv_padded: torch.Tensor | None,
    *rest: Any,
) -> list[torch.Tensor]:
    """Return [output [t, h, d], log of the softmax's sums [t, h, 1] float32, random state], computed segment by
    segment.
    """
    assert q.dim() == 3 and dropout == 0.0 and window in ((-1, -1), (-1, 0)), (q.shape, dropout, window)
    assert q.dtype in (torch.float16, torch.bfloat16), "cuDNN's attention computes in 16 bits"
    assert cu_q.dtype == cu_kv.dtype == torch.int32
    assert int(cu_q.diff().max()) <= max_q and int(cu_kv.diff().max()) <= max_kv, "longer than max_seqlen"
    causal = _is_causal(mask_type)
    q, k, v = q.detach(), k.detach(), v.detach()
    output = torch.zeros(q.size(0), q.size(1), v.size(2), dtype=q.dtype)
    sums = torch.full((q.size(0), q.size(1), 1), -torch.inf)
    for rows, columns in _segments(cu_q, cu_kv, cu_q_padded, cu_kv_padded):
        scores = _scores(q[rows], k[columns], scale, causal, bottom_right)
        sums[rows] = scores.logsumexp(-1).t()[..., None]
        output[rows] = (scores.softmax(-1) @ _by_head(v[columns], q)).transpose(0, 1).to(q.dtype)
    return [output, sums, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    max_q: int,
    max_kv: int,
    scale: float,
    dropout: float,
    zero_fill: bool,
    qkv_layout: Any,
    o_format: Any,
    do_format: Any,
    dqkv_layout: Any,
    scale_inv_format: Any,
    do_scale_inv_format: Any,
    bias_type: Any,
    mask_type: Any,
    softmax_type: Any,
    window: Any,
    bottom_right: bool,
    deterministic: bool,
    cu_q: torch.Tensor,
    cu_kv: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    output: torch.Tensor,
    gradient: torch.Tensor,
    fake_dtype: Any,
    kept: Any,
    cu_q_padded: torch.Tensor | None,
    cu_kv_padded: torch.Tensor | None,
    *rest: Any,
) -> list[torch.Tensor | None]:
    """Return the gradients of q, k and v from the output and the sums that the forward pass kept.

    In a ring, output and sums cover the keys of all ranks, not only the keys of this step.
    """
    causal, sums = _is_causal(mask_type), kept[0]
    shared_by = q.size(1) // k.size(1)
    dq, dk, dv = (torch.zeros(x.shape) for x in (q, k, v))
    for rows, columns in _segments(cu_q, cu_kv, cu_q_padded, cu_kv_padded):
        queries, flow = (x[rows].float().transpose(0, 1) for x in (q, gradient))  # [h, nq, d]
        scores = _scores(q[rows], k[columns], scale, causal, bottom_right)
        chances = (scores - sums[rows].transpose(0, 1)).exp()  # [h, nq, nk]
        mean = (flow * output[rows].float().transpose(0, 1)).sum(-1, keepdim=True)
        dscores = chances * (flow @ _by_head(v[columns], q).transpose(1, 2) - mean) * scale
        dq[rows] = (dscores @ _by_head(k[columns], q)).transpose(0, 1)
        for target, by_head in (
            (dk, dscores.transpose(1, 2) @ queries),
            (dv, chances.transpose(1, 2) @ flow),
        ):
            target[columns] = by_head.unflatten(0, (-1, shared_by)).sum(1).transpose(0, 1)
    return [dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None]


def _is_causal(mask_type: Any) -> bool:
    masks = sys.modules["transformer_engine_torch"].NVTE_Mask_Type
    assert mask_type in (masks.NVTE_PADDING_CAUSAL_MASK, masks.NVTE_PADDING_MASK), mask_type
    return bool(mask_type == masks.NVTE_PADDING_CAUSAL_MASK)


def _segments(
    cu_q: torch.Tensor, cu_kv: torch.Tensor, starts_q: torch.Tensor | None, starts_kv: torch.Tensor | None
) -> Iterator[tuple[slice, slice]]:
    """Return the places of each segment's queries and keys. cu_q and cu_kv give the lengths. The padded versions, if
    any, give the starts.
    """
    starts_q, starts_kv = cu_q if starts_q is None else starts_q, cu_kv if starts_kv is None else starts_kv
    lengths = zip(cu_q.diff().tolist(), cu_kv.diff().tolist(), strict=True)
    for (nq, nk), q, kv in zip(lengths, starts_q.tolist(), starts_kv.tolist(), strict=False):
        if nq:
            yield slice(q, q + nq), slice(kv, kv + nk)


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float, causal: bool, bottom_right: bool) -> torch.Tensor:
    """Return the scores [h, nq, nk] float32 of one segment. A score is -inf if the query must not attend to
    the key.
    """
    scores = q.float().transpose(0, 1) @ _by_head(k, q).transpose(1, 2) * scale
    if causal:
        first = k.size(0) - q.size(0) if bottom_right else 0
        seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(first)
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores


def _by_head(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return keys or values [n, kv_heads, d] as [h, n, d] float32, repeated for each group of query heads that shares
    a head.
    """
    return x.float().transpose(0, 1).repeat_interleave(q.size(1) // x.size(1), 0)


# -- packed rows to padded batches and back, for the attention in float32 ------------------------------------


def convert_thd_to_bshd(
    tensor: torch.Tensor, cu_seqlens: torch.Tensor, b: int, max_seq_len: int
) -> torch.Tensor:
    """Convert [tokens, ...] to [segments, longest, ...], with zeros after each segment."""
    padded = tensor.new_zeros(b, max_seq_len, *tensor.shape[1:])
    segments = tensor.detach()[: int(cu_seqlens[-1])].split(cu_seqlens.diff().tolist())
    for number, segment in enumerate(segments):
        padded[number, : segment.size(0)] = segment
    return padded


def convert_bshd_to_thd(tensor: torch.Tensor, cu_seqlens: torch.Tensor, t: int) -> torch.Tensor:
    """Convert [segments, longest, ...] to [tokens, ...]."""
    packed = tensor.new_zeros(t, *tensor.shape[2:])
    segments = zip(cu_seqlens.tolist(), cu_seqlens.diff().tolist(), strict=False)
    for number, (start, length) in enumerate(segments):
        packed[start : start + length] = tensor.detach()[number, :length]
    return packed
