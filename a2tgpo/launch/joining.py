"""Connect the ranks within a time limit: first to torch's TCP store, then to the process group."""

from __future__ import annotations

import os
import platform
import sys
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from a2tgpo.config.run import RunConfig
from a2tgpo.io.exit_codes import BROKEN_RUN
from a2tgpo.lifecycle.failure import GRACE_S

if TYPE_CHECKING:
    from torch.distributed import Store

    from a2tgpo.parallel.groups import ParallelGroups

MAX_LINES = 20
"""Rank 0 prints one line per rank for at most this many ranks."""
SELF_CONNECT_S = 15.0
"""Longest time, in seconds, that rank 0 waits for a connection to its own store."""


def say(line: str) -> None:
    print(f"preflight: {line}", file=sys.stderr, flush=True)


def open_store(timeout_s: float) -> Store:
    """Return a connection to the store at MASTER_ADDR:MASTER_PORT, which torchrun or rank 0 serves.

    Raises:
        RuntimeError: with a one-line message, if rank 0 cannot serve the store, or if this rank cannot reach it
            within `timeout_s`.
    """
    from torch.distributed import DistError, PrefixStore, TCPStore

    address, port, rank = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), os.environ["RANK"]
    is_server = rank == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = TCPStore(
            address,
            port,
            is_master=is_server,
            timeout=timedelta(seconds=min(timeout_s, SELF_CONNECT_S) if is_server else timeout_s),
            wait_for_workers=False,
        )
    except DistError as error:
        where = f"{address}:{port} (MASTER_ADDR, MASTER_PORT)"
        if is_server:
            reason = "is in use" if "EADDRINUSE" in str(error) else "is not an address of this machine"
            raise RuntimeError(
                f"preflight: {where} {reason}, {platform.node()}, where rank 0 runs; export an address and a free "
                "port of this machine, or unset both if another job left them in the environment"
            ) from None
        raise RuntimeError(
            f"preflight: {platform.node()} did not reach rank 0 at {where} within {timeout_s:g} s: rank 0 did not "
            "start, a firewall blocks the port, or the name resolves to another machine"
        ) from None
    store.set_timeout(timedelta(seconds=timeout_s))
    # torchrun's store keeps its keys when torchrun restarts ranks, so the prefix contains the number of restarts.
    return PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def join(
    config: RunConfig, store: Store | None, *, rank: int, world_size: int
) -> tuple[ParallelGroups, float]:
    """Join the process group within `parallel.start_timeout_s`, and test it; every rank must call this.

    With `run.deterministic`, this process computes deterministically from then on.

    Returns:
        The groups, and the seconds that the ranks took to join, not counting the import of Megatron.

    Raises:
        ConfigError: if this machine cannot compute deterministically.
        RuntimeError: with a one-line message, if the backend cannot connect this rank to the others.
    """
    import torch
    import torch.distributed as dist

    from a2tgpo.parallel.determinism import compute_deterministically
    from a2tgpo.parallel.initialize import initialize

    if config.run.deterministic:
        compute_deterministically()

    if store is None:
        return initialize(config.parallel, seed=config.run.seed), 0.0
    store.set(f"ready/{rank}", "")
    deadline = Deadline(
        store.clone(),  # type: ignore[attr-defined]  # torch's stub lacks it
        config.parallel.start_timeout_s,
        rank=rank,
        world_size=world_size,
    )
    begin = time.monotonic()
    try:
        groups = initialize(config.parallel, seed=config.run.seed, store=store)
        total = torch.ones(1, device=groups.device)
        dist.all_reduce(total)
        total = total.cpu()
    except dist.DistError as error:
        reason = " ".join(str(error).split())
        raise RuntimeError(
            f"preflight: {platform.node()} is not connected to all ranks ({reason:.300})"
        ) from None
    assert total.item() == world_size, f"{total.item()} of {world_size} ranks in the first all-reduce"
    deadline.met()
    return groups, time.monotonic() - begin


class Deadline:
    """Ends the process if `met` is not called in time, because a hanging collective cannot be cancelled."""

    def __init__(self, store: Store, seconds: float, *, rank: int, world_size: int):
        self._store, self._seconds, self._rank, self._world_size = store, seconds, rank, world_size
        # The other ranks wait longer than rank 0, so that rank 0 is the first to report.
        self._timer = threading.Timer(seconds + (GRACE_S if rank else 0), self._end)
        self._timer.daemon = True
        self._timer.start()

    def met(self) -> None:
        self._timer.cancel()

    def _end(self) -> None:
        if self._rank == 0:
            late = [rank for rank in range(self._world_size) if not self._store.check([f"ready/{rank}"])]
            for rank in late[:MAX_LINES]:
                key = f"here/{rank}"  # this key does not exist if the machines were not checked
                host = f" on {self._store.get(key).decode()}" if self._store.check([key]) else ""
                say(f"rank {rank}{host}: not ready to join the others within {self._seconds:g} s")
            if not late:
                say(
                    f"all {self._world_size} ranks connected, but the first all-reduce timed out after "
                    f"{self._seconds:g} s: check the network; NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME selects the "
                    "interface, NCCL_DEBUG=INFO logs details"
                )
        os._exit(BROKEN_RUN)
