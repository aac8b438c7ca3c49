"""The shape of a row in which sequences branch off a common prefix."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TreeNode:
    """Positions [start, end) of a row: each attends to the node's prefix, and causally within the node.

    A trunk has an empty prefix; the prefix of a branch is the beginning of a trunk.
    """

    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0
