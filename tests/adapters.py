"""Give the adapters of a policy values with which they change what the policy computes."""

from __future__ import annotations

import zlib

import torch

from a2tgpo.model.policy import Policy


def fill_adapters(policy: Policy, *, spread: float = 0.3) -> None:
    """Give every B normal values that depend only on its projection's name. A rank gets its own rows of them."""
    assert policy.adapters is not None
    for adapter in policy.adapters.by_weight.values():
        for projection in adapter.projections:
            _, second = adapter.pair(projection)
            size = policy.groups.tp_size if second.tensor_model_parallel else 1  # type: ignore[attr-defined]
            generator = torch.Generator().manual_seed(zlib.crc32(projection.name.encode()) + 1)
            whole = spread * torch.randn(size * second.size(0), second.size(1), generator=generator)
            second.data.copy_(whole.chunk(size)[policy.groups.tp_rank % size])
