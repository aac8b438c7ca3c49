"""Trees of trajectories that branch between turns (`rollout.tree`).

A node is a turn. Its key is the sample index of the trajectory that played it, and the turn's index. A branch keeps
the first turns of its parent, and plays the others itself:

    entropy   the branch plays a process turn of its parent again. The turns with the highest entropy are chosen
              (AT2PO, arXiv 2601.04767).
    random    the branch continues after a process turn of its parent. Each tree gets the same number of branches, and
              its turns are drawn at random (Tree-GRPO, arXiv 2509.21240).

Branches begin in rounds. A prompt's next round begins when all its trajectories have ended, so no prompt waits for
another. The branches depend only on the seed, the prompt and the trajectories, and not on the engine that plays them.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from a2tgpo.config.rollout import TreeConfig
from a2tgpo.rollout.branch_point import BranchPoint, branch_of
from a2tgpo.rollout.carried_group import copied
from a2tgpo.rollout.multi_turn import LiveTrajectory
from a2tgpo.trajectory import Trajectory


class TreeGrowth:
    """Decide when and where the trajectories of each prompt branch. All ranks of an engine make the same decisions.

    Args:
        group_size: number of trajectories per prompt, including branches.
        seed: a text that names the run and the step, and that seeds the random choices.
    """

    def __init__(self, config: TreeConfig, *, group_size: int, seed: str):
        self._config = config
        self._sizes = config.round_sizes(group_size)
        self._seed = seed
        self._ended: dict[int, list[LiveTrajectory]] = {}
        """The trajectories of each prompt that have ended, as they were before they got rewards and gains."""

    def branches_after(self, done: LiveTrajectory) -> list[LiveTrajectory]:
        """Return the branches that begin now that `done` has ended. Usually there are none.

        Call this before `done` gets a reward, because branches copy its turns.
        """
        members = self._ended.setdefault(done.group.prompt.index, [])
        members.append(replace(done, trajectory=copied(done.trajectory)))
        totals = list(itertools.accumulate(self._sizes))
        if len(members) not in totals[:-1]:
            return []
        members.sort(key=lambda member: member.trajectory.sample_index)
        points = self._points(members, self._sizes[totals.index(len(members)) + 1])
        return [
            branch_of(members[point.parent], point, sample_index=len(members) + place)
            for place, point in enumerate(points)
        ]

    def _points(self, members: Sequence[LiveTrajectory], count: int) -> list[BranchPoint]:
        trajectories, prompt = [member.trajectory for member in members], members[0].group.prompt
        if self._config.choice == "entropy":
            return entropy_points(trajectories, count, sibling_penalty=self._config.sibling_penalty)
        return random_points(trajectories, count, seed=f"{self._seed}|{prompt.index}|{prompt.id}")


def entropy_points(members: Sequence[Trajectory], count: int, *, sibling_penalty: float) -> list[BranchPoint]:
    """Return the places to branch at the `count` best process turns. A turn's value is its entropy minus
    `sibling_penalty` per sibling.

    Turns of equal value are chosen in the order of their trajectories. If there are fewer turns than `count`, turns
    are chosen more than once. If there is no process turn, branches begin at the prompt.

    Args:
        members: all trajectories of a prompt, in the order of their sample indices, which begin at 0.
    """
    num_children = Counter(parent for parent, _ in {edge for member in members for edge in _edges(member)})
    entropies: dict[bytes, float] = {}
    values = []
    for member in members:
        path = b""
        for (parent, node), turn in zip(_edges(member), member.turns, strict=True):
            path += turn.tokens.tobytes() + turn.observation_tokens.tobytes()
            # Equal tokens may have log-probs that differ in the last bit, so turns with equal paths get one entropy.
            entropy = entropies.setdefault(path, turn.entropy)
            if turn.is_process and node[0] == member.sample_index:
                values.append((sibling_penalty * (num_children[parent] - 1) - entropy, node))
    chosen = [BranchPoint(*node) for _, node in sorted(values)] or _at_prompt(members)
    return [chosen[place % len(chosen)] for place in range(count)]


def random_points(members: Sequence[Trajectory], count: int, *, seed: str) -> list[BranchPoint]:
    """Draw `count` process turns in total from a prompt's trees, and return the places after these turns.

    The turns drawn from a tree are all different if the tree has enough turns. In a tree without process turns,
    branches begin at the prompt.

    Args:
        members: as for `entropy_points`.
        seed: a text that names the prompt. A round's draws also depend on the number of members.
    """
    roots = sorted({member.root for member in members})
    drawn: dict[int, list[BranchPoint]] = {}
    for place, root in enumerate(roots):
        own = [member for member in members if member.root == root]
        nodes = [
            BranchPoint(member.sample_index, index + 1)
            for member in own
            for index, (owner, turn) in enumerate(zip(member.owners, member.turns, strict=True))
            if turn.is_process and owner == member.sample_index
        ] or _at_prompt(own[:1])
        number = len(range(place, count, len(roots)))
        generator = random.Random(f"{seed}|{root}|{len(members)}")
        enough = len(nodes) >= number
        drawn[root] = generator.sample(nodes, number) if enough else generator.choices(nodes, k=number)
    return [drawn[roots[place % len(roots)]][place // len(roots)] for place in range(count)]


def _edges(trajectory: Trajectory) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return for each turn the node before it and its own node. The node before the first turn is (-1, -1)."""
    nodes = [(owner, index) for index, owner in enumerate(trajectory.owners)]
    return list(zip([(-1, -1), *nodes], nodes, strict=False))


def _at_prompt(members: Sequence[Trajectory]) -> list[BranchPoint]:
    return [BranchPoint(member.sample_index, 0) for member in members]
