"""Shared memory between the ranks of an engine on a CPU: names are unique to the run, and no segment outlives it."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from a2tgpo.parallel.collectives import broadcast_object, world_group

SEGMENTS = Path("/dev/shm")


@contextlib.contextmanager
def own_segments(communicator: Any) -> Iterator[None]:
    """Make an engine's construction use segment names of this run; all ranks of the world enter and leave together.

    If a launcher started the ranks, vLLM uses the same segment names in every run
    (vllm/distributed/device_communicators/cpu_communicator.py, make_group_name). Segments of a killed run, or of
    another run on this machine, would keep this run from starting.

    Args:
        communicator: vLLM's class whose `make_group_name` names the segments.
    """
    token = broadcast_object(secrets.token_hex(8), world_group(), source=0)
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
        # All ranks have mapped the segments by now; once unlinked, the segments end with the processes.
        for path in SEGMENTS.iterdir() if names else ():
            if any(name in path.name for name in names):
                path.unlink(missing_ok=True)
