"""Exchange messages between ranks through the rendezvous store, without a collective."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist


def side_store(name: str, *, timeout_s: float) -> dist.Store:
    """Return a view of the default store with the key prefix `name`, and with its own connection and timeout.

    If the connection were shared, this timeout would also limit the creation of communicators.
    """
    store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]  # torch's stub lacks it
    store.set_timeout(timedelta(seconds=timeout_s))
    return dist.PrefixStore(name, store)
