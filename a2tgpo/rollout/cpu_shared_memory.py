"""Shared memory between the ranks of an engine on a CPU: under names that no other run has, and that none leaves."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from a2tgpo.parallel.collectives import broadcast_object

SEGMENTS = Path("/dev/shm")


@contextlib.contextmanager
def own_segments(communicator: Any) -> Iterator[None]:
    """Around the construction of an engine; all ranks of the world enter and leave it together.

    Where the ranks were started by a launcher, vLLM names the segments alike in every run
    (vllm/distributed/device_communicators/cpu_communicator.py, make_group_name). The segments of a run that was
    killed, or of one beside this one, would keep this one from starting.

    Args:
        communicator: vLLM's class whose `make_group_name` names them.
    """
    world = dist.group.WORLD
    assert world is not None, "the ranks have joined"
    token = broadcast_object(secrets.token_hex(8), world, source=0)
    make_name = communicator.make_group_name
    names: set[str] = set()

    def make_own_name(instance: Any) -> str:
        name = f"{make_name(instance)}-{token}"
        names.add(name.rpartition("/")[2])
        return name

    communicator.make_group_name = staticmethod(make_own_name)
    try:
        yield
    finally:
        communicator.make_group_name = staticmethod(make_name)
        # All ranks of a group have mapped its segments when it is made: without a name they end with the processes.
        for path in SEGMENTS.iterdir() if names else ():
            if any(name in path.name for name in names):
                path.unlink(missing_ok=True)
