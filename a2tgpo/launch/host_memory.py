"""Find how much host memory this process can still take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

CGROUPS = "sys/fs/cgroup"
"""Path of the folder of control groups, relative to the root of the file system."""


def memory_left(root: Path = Path("/")) -> tuple[int, str]:
    """Return the bytes of host memory that this process can still take, and the name of the limit it reaches first.

    The page cache is treated as free memory, because the kernel can reclaim it.

    Args:
        root: the folder in which `proc` and `sys` are mounted.
    """
    lines = (root / "proc/meminfo").read_text().splitlines()
    available = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    left = [(int(available) * 1024, "MemAvailable")]
    left += _left_in_groups(root)
    return min(left)


def _left_in_groups(root: Path) -> Iterator[tuple[int, str]]:
    """Yield the bytes left and the name of the limit, for each control group (version 1 or 2) of this process."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, names = root / CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / CGROUPS / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(mount) and (left := _left_in(folder, *names)) is not None:
                yield left, f"{names[0]} of its control group"


def _left_in(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    """Return the bytes left in the control group `folder`, or None if it has no limit or cannot be read."""
    try:
        allowed = int((folder / limit).read_text())
        used = int((folder / usage).read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
        cached = next((int(line.split()[1]) for line in lines if line.startswith(f"{cache} ")), 0)
        return max(0, allowed - used + cached)
    except (OSError, ValueError):  # a group without a limit has the word "max" instead of a number
        return None
