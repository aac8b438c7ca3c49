"""Start the ranks of tools/gpu_check.py.

Without a launcher, the program starts all ranks itself. Under torchrun or srun, each copy of the program starts its
own rank.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import socket
import time
from datetime import timedelta
from typing import Any

from a2tgpo.launch.rendezvous import launched

from gpu_checks.bench import Row


def launched_environment() -> dict[str, str] | None:
    """Return this process's environment, with torchrun's variables for rank, world size and meeting point.

    Return None if no launcher started this process as one of several.

    Raises:
        ValueError: if a launcher started this process as one of several, but the environment has no meeting point.
    """
    names = launched(os.environ)
    if names is None:
        return None
    # With torchrun's own variables, all ranks would use torchrun's store. That store serves only one port, but every
    # check uses a different port.
    return {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC_")} | names


def rank_environments(
    launched: dict[str, str] | None, *, num_ranks: int, alone: bool, index: int
) -> list[dict[str, str]]:
    """Return the environment of each rank that this process starts for check number `index`.

    Args:
        launched: the result of `launched_environment`. If it is not None, this process starts only its own rank.
        num_ranks: number of ranks that this process starts if `launched` is None.
        alone: whether the check runs on rank 0 only.
    """
    if launched is not None:
        environment = launched | {"MASTER_PORT": str(int(launched["MASTER_PORT"]) + 2 + index)}
        if not alone:
            return [environment]
        return [environment | {"WORLD_SIZE": "1"}] if environment["RANK"] == "0" else []
    num_ranks = 1 if alone else num_ranks
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]


class RankSync:
    """After each check, synchronise the copies of this program that a launcher started. Do nothing if there is one
    process.

    All copies exit with rank 0's exit code at the same time, because a launcher ends all ranks as soon as one fails.
    """

    def __init__(self, launched: dict[str, str] | None, *, timeout_s: float):
        self._store: Any = None
        self.rank = int(launched["RANK"]) if launched else 0
        self._world_size = int(launched["WORLD_SIZE"]) if launched else 1
        if launched and self._world_size > 1:
            from torch.distributed import TCPStore

            # Wait long enough for another rank's slowest check and its cleanup.
            patience = timedelta(seconds=timeout_s + 60)
            port = int(launched["MASTER_PORT"]) + 1
            self._store = TCPStore(
                launched["MASTER_ADDR"], port, self._world_size, self.rank == 0, timeout=patience
            )

    def share(self, check: str, rows: list[Row]) -> list[Row]:
        """On rank 0, return its own `rows` and the other ranks' failures. On other ranks, return an empty list."""
        if self._store is None:
            return rows
        if self.rank > 0:
            where = f"rank {self.rank} on {platform.node()}: "
            records = [dataclasses.asdict(dataclasses.replace(row, note=where + row.note)) for row in rows]
            self._store.set(f"{check}/{self.rank}", json.dumps(records))
            self._store.get(f"{check}/heard")
            return []
        for rank in range(1, self._world_size):
            rows = rows + [Row(**row) for row in json.loads(self._store.get(f"{check}/{rank}"))]
        self._store.set(f"{check}/heard", "yes")
        return rows

    def agree(self, exit_code: int) -> int:
        """Return rank 0's `exit_code` on all ranks. No other method may be called afterwards."""
        if self._store is None:
            return exit_code
        if self.rank > 0:
            exit_code = int(self._store.get("exit code"))
            self._store.add("left", 1)
            return exit_code
        self._store.set("exit code", str(exit_code))
        deadline = time.monotonic() + 30
        while self._store.add("left", 0) < self._world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.05)  # the store lives in this process, so wait for all ranks
        return exit_code
