"""How many files and connections this process may have open at a time."""

from __future__ import annotations

import resource

FILES_PER_RANK = 5
"""Connections of rank 0, which has most: three to the store that it serves and two of gloo, from or to each rank."""
FILES_BESIDE = 512
"""Of libraries, cards, data and checkpoints."""


def raise_limit() -> None:
    """Raise the soft limit of this process to the hard one: many systems start with 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def limit_fault(world_size: int) -> str | None:
    """What is wrong with the hard limit of this process for a run of `world_size` ranks."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = FILES_PER_RANK * world_size + FILES_BESIDE
    if hard == resource.RLIM_INFINITY or hard >= needed:
        return None
    return (
        f"may have {hard} files open at a time, {world_size} ranks take up to {needed}: raise the hard limit "
        "(`ulimit -Hn` shows it; nofile in /etc/security/limits.conf, LimitNOFILE of slurmd or of the container)"
    )
