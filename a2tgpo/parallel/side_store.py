"""The store in which the ranks met, for what they tell each other beside the training."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist


def side_store(name: str, *, timeout_s: float) -> dist.Store:
    """Keys of their own in the default store, over a connection of their own, whose waits end after `timeout_s`.

    A timeout holds for a whole connection: on the default one it would also end the waits in which communicators are
    made.
    """
    store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]  # torch's stub lacks it
    store.set_timeout(timedelta(seconds=timeout_s))
    return dist.PrefixStore(name, store)
