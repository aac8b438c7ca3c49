"""Raise and check the limit on the number of files and connections that this process may have open."""

from __future__ import annotations

import resource

FILES_PER_RANK = 5
"""Connections that rank 0 has open for each rank of the run: three to rank 0's store, and two for gloo."""
FILES_BESIDE = 512
"""Number of files that a process opens for libraries, GPUs, data and checkpoints."""


def raise_limit() -> None:
    """Raise this process's soft limit to the hard limit, because the soft limit is only 1,024 on many systems."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def limit_fault(world_size: int) -> str | None:
    """Return a fault if this process's hard limit is too low for a run of `world_size` ranks, else None."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = FILES_PER_RANK * world_size + FILES_BESIDE
    if hard == resource.RLIM_INFINITY or hard >= needed:
        return None
    return (
        f"may have {hard} open files, but {world_size} ranks need up to {needed}: raise the hard limit "
        "(`ulimit -Hn` shows it; nofile in /etc/security/limits.conf, LimitNOFILE of slurmd or of the container)"
    )
