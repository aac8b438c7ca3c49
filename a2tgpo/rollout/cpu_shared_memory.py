"""Give the shared memory of a CPU engine names that are unique to the run, and free the memory when the run ends."""

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
    """Make engines that are constructed in this context use shared-memory names of this run.

    All ranks of the world must enter and leave this context together. By default, vLLM uses the same names in every
    run under a launcher such as torchrun (vllm/distributed/device_communicators/cpu_communicator.py,
    make_group_name). Shared memory of another run or of a killed run would then keep this run from starting.

    Args:
        communicator: the vLLM class whose method `make_group_name` names the shared memory.
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
        # All ranks have mapped the shared memory by now. Unlinked memory is freed when the processes end.
        for path in SEGMENTS.iterdir() if names else ():
            if any(name in path.name for name in names):
                path.unlink(missing_ok=True)
