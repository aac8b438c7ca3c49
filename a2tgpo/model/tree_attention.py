"""Attention along a tree: branches that share the beginning of one trunk, in one packed pass.

Kernels for packed sequences support only causal segments. During such a pass plain scaled dot product attention
therefore replaces the core attention of every layer, on GPUs and CPUs; the core attention has no weights.
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
    """Replacement of a core attention on packed sequences.

    Args:
        nodes: the row's nodes; positions outside of all nodes get zeros.
        softmax_scale: None: 1 / sqrt(head_dim).
    """

    def __init__(self, nodes: Sequence[TreeNode], softmax_scale: float | None) -> None:
        super().__init__()
        self._nodes = nodes
        self._scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """query [tokens, heads, head_dim], key, value [tokens, kv_heads, head_dim] -> [tokens, heads * head_dim]."""
        output = torch.zeros_like(query)
        for node in self._nodes:
            own, prefix = slice(node.start, node.end), slice(node.prefix_start, node.prefix_end)
            keys, values = (torch.cat([tensor[prefix], tensor[own]]) for tensor in (key, value))
            output[own] = self._attend(query[own], keys, values)
        return output.flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Let query i of the last n positions attend to all keys but the last n - 1 - i."""
        num_queries, num_keys = query.size(0), key.size(0)
        mask = None
        if num_keys > num_queries:
            # On GPUs PyTorch has no fused kernel for a mask with grouped heads: it creates [heads, queries, keys]
            # scores and copies keys and values for every head, in float32. The cost is small: a branch has few
            # queries (scaffold and answer) and saves no activations, and branches run one by one. A trunk needs no
            # mask and is fused.
            mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
            mask = mask.tril(num_keys - num_queries)
        return attend(query, key, value, mask, self._scale)


@contextlib.contextmanager
def attending_along(chunk: Any, nodes: Sequence[TreeNode], positions: Tensor) -> Iterator[None]:
    """Run `chunk` on a row of the shape `nodes`, laid out as one segment, inside this context.

    Only for passes without gradients and without context parallelism, since every rank needs all keys of its
    tensor-parallel heads.

    Args:
        positions: [1, T] int64 on the model's device: rotary position of every place of the row, below T.
    """
    model = unwrapped(chunk)
    layers = [layer.self_attention for layer in model.decoder.layers]
    replaced = [layer.core_attention for layer in layers]
    rows = positions[0]

    def rows_of_table(_module: nn.Module, _arguments: Any, table: Tensor) -> Tensor:
        # Megatron uses the table's i-th row for the i-th token of a segment.
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
