"""Compute one segment's attention with PyTorch, on CPUs and for masks that fused kernels do not support."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Return scaled dot product attention, [queries, heads, head_dim].

    Args:
        query: [queries, heads, head_dim].
        key: [keys, kv_heads, head_dim], where heads is a multiple of kv_heads.
        value: [keys, kv_heads, head_dim].
        mask: [queries, keys] bool, True if the query attends to the key. None: a causal mask.
        scale: factor of the products of queries and keys. None: 1 / sqrt(head_dim).
    """
    # [length, heads, head_dim] -> [1, heads, length, head_dim]
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    output = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.size(1) != k.size(1)
    )
    return output[0].transpose(0, 1)
