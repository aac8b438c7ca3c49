"""Attention along a tree, so that one pass runs a trunk and branches. Each branch continues a prefix of the trunk.

Kernels for packed sequences support only causal segments. The pass therefore replaces every layer's core attention,
which has no weights, by plain scaled dot product attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from a2tgpo.batch.packing import TreeNode
from a2tgpo.model.plain_attention import attend
from a2tgpo.model.policy import unwrapped


class TreeAttention(nn.Module):
    """Replacement of a core attention, for a packed row that forms a tree.

    Args:
        nodes: the nodes of the tree. The output is zero at positions that belong to no node.
        softmax_scale: factor of the products of queries and keys. None: 1 / sqrt(head_dim).
    """

    def __init__(self, nodes: Sequence[TreeNode], softmax_scale: float | None) -> None:
        super().__init__()
        self._nodes = nodes
        self._scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return the result of attention, [tokens, heads * head_dim].

        The query has shape [tokens, heads, head_dim]. Key and value have shape [tokens, kv_heads, head_dim].
        """
        output = torch.zeros_like(query)
        for node in self._nodes:
            own, prefix = slice(node.start, node.end), slice(node.prefix_start, node.prefix_end)
            keys, values = (torch.cat([tensor[prefix], tensor[own]]) for tensor in (key, value))
            output[own] = self._attend(query[own], keys, values)
        return output.flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the attention of n queries. Query i attends to all keys except the last n - 1 - i keys."""
        num_queries, num_keys = query.size(0), key.size(0)
        mask = None
        if num_keys > num_queries:
            # PyTorch has no fused GPU kernel for a mask with grouped heads. For a branch, PyTorch creates float32
            # scores [heads, queries, keys] and copies keys and values for every head. The cost is small, because
            # branches have few queries and run one after the other.
            mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
            mask = mask.tril(num_keys - num_queries)
        return attend(query, key, value, mask, self._scale)


@contextlib.contextmanager
def attending_along(chunk: Any, nodes: Sequence[TreeNode], positions: Tensor) -> Iterator[None]:
    """Make `chunk` attend along the tree `nodes` inside this context. The row must be one segment.

    Passes inside it must not compute gradients. Context parallelism is impossible, because each rank needs all keys
    of its heads.

    Args:
        positions: [1, T] int64 on the model's device: the rotary position of each token in the row, less than T.
    """
    model = unwrapped(chunk)
    layers = [layer.self_attention for layer in model.decoder.layers]
    replaced = [layer.core_attention for layer in layers]
    rows = positions[0]

    def rows_of_table(_module: nn.Module, _arguments: Any, table: Tensor) -> Tensor:
        # Megatron uses row i of the table for token i of a segment, so reorder the table.
        return table[rows]

    hook = model.rotary_pos_emb.register_forward_hook(rows_of_table)
    try:
        for layer in layers:
            layer.core_attention = TreeAttention(nodes, layer.config.softmax_scale)
        yield
    finally:
        hook.remove()
        for layer, core_attention in zip(layers, replaced, strict=True):
            layer.core_attention = core_attention
