"""Values of the nodes of a tree of trajectories, whose leaves may be on several ranks.

A node is a turn that one or more trajectories contain (`Trajectory.owners`). A trajectory's last turn is a leaf.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from a2tgpo.parallel.collectives import all_gather_object
from a2tgpo.trajectory import Trajectory

Node = tuple[int, int, int]
"""Number of the prompt, sample index of the trajectory that played the turn, and index of the turn."""


@dataclass(frozen=True)
class Path:
    """The nodes of a trajectory, from its first turn to its last."""

    nodes: list[Node]
    entropies: list[float]
    """Entropy of each turn (`Turn.entropy`), in nats."""
    value: float
    """Value of the leaf."""


def paths_of(trajectories: Sequence[Trajectory], values: Sequence[float]) -> list[Path]:
    """Return the path of each trajectory. `values` has the value of each trajectory's leaf."""
    return [
        Path(
            nodes=[(t.prompt_index, owner, index) for index, owner in enumerate(t.owners)],
            entropies=[turn.entropy for turn in t.turns],
            value=value,
        )
        for t, value in zip(trajectories, values, strict=True)
    ]


def gather_paths(own: Sequence[Path], *, dp_group: dist.ProcessGroup | None) -> list[Path]:
    """Return the paths of all ranks in an order that does not depend on the ranks. Every rank must call this."""
    parts = [own] if dp_group is None else all_gather_object(own, dp_group)
    return sorted((path for part in parts for path in part), key=lambda path: path.nodes[-1:])


def softmax_values(paths: Sequence[Path]) -> dict[Node, float]:
    """Return the value of each node: V_n = sum_c w_c V_c, where w is the softmax of the entropies of n's children c.

    The value of a leaf is `Path.value`.
    """
    children: dict[Node, dict[Node, float]] = defaultdict(dict)
    values: dict[Node, float] = {}
    for path in paths:
        for parent, node, entropy in zip(path.nodes, path.nodes[1:], path.entropies[1:], strict=False):
            children[parent].setdefault(node, entropy)
        values.update(dict.fromkeys(path.nodes[-1:], path.value))
    for node in sorted(children, key=lambda node: node[2], reverse=True):  # children before their parents
        entropies = children[node]
        largest = max(entropies.values())
        weights = {child: math.exp(entropy - largest) for child, entropy in entropies.items()}
        weighted = (weight * values[child] for child, weight in weights.items())
        values[node] = math.fsum(weighted) / math.fsum(weights.values())
    return values
