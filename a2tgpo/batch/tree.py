"""The shape of a row in which sequences branch off a common beginning."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TreeNode:
    """Positions [start, end) of a row: each attends to the node's prefix, and to its own up to itself.

    A trunk has an empty prefix; a branch has the beginning of a trunk as its prefix.
    """

    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0
