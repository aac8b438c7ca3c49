"""This process's limit of open files and connections."""

from __future__ import annotations

import resource

FILES_PER_RANK = 5
"""Connections of rank 0, which has the most, per rank: three to the store that it serves, and two of gloo."""
FILES_BESIDE = 512
"""Files of libraries, GPUs, data and checkpoints."""


def raise_limit() -> None:
    """Raise this process's soft limit to the hard limit: many systems start with 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def limit_fault(world_size: int) -> str | None:
    """Return the fault of this process's hard limit for a run of `world_size` ranks; None if it suffices."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = FILES_PER_RANK * world_size + FILES_BESIDE
    if hard == resource.RLIM_INFINITY or hard >= needed:
        return None
    return (
        f"may have {hard} open files, but {world_size} ranks need up to {needed}: raise the hard limit "
        "(`ulimit -Hn` shows it; nofile in /etc/security/limits.conf, LimitNOFILE of slurmd or of the container)"
    )
