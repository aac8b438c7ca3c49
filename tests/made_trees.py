"""Trees of trajectories for tests of advantages."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from a2tgpo.advantage.estimator import compute_advantages
from a2tgpo.advantage.turn_table import TurnAdvantages, build_turn_table
from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.trajectory import Branch, Call, Trajectory, Turn

MAX_TURNS, NUM_PROMPTS = 4, 2


@dataclass(frozen=True)
class Leaf:
    """A trajectory of a tree. A branch keeps the first turns of an earlier trajectory of its prompt."""

    prompt: int
    entropies: tuple[float, ...]
    """Entropies of the turns that the trajectory plays itself, in nats."""
    outcome: float
    parent: int | None = None
    """Sample index of the trajectory from which this one branches."""
    num_shared: int = 0
    """The branch keeps at most this many of the process turns of its parent."""
    final: bool = True
    """Whether the last turn is a final turn."""


LEVELS = st.integers(0, 128).map(lambda k: k / 64)
"""Entropies that float32 holds exactly."""


def forests(*, branches=True, prompts=NUM_PROMPTS):
    leaf = st.builds(
        Leaf,
        prompt=st.integers(0, prompts - 1),
        entropies=st.lists(LEVELS, min_size=1, max_size=MAX_TURNS + 1).map(tuple),
        outcome=st.sampled_from([-1.0, 0.0, 0.5, 1.0]),
        parent=st.none() | st.integers(0, 7) if branches else st.none(),
        num_shared=st.integers(0, MAX_TURNS),
        final=st.booleans(),
    )
    return st.lists(leaf, min_size=1, max_size=12)


def trajectories_of(leaves: list[Leaf]) -> list[Trajectory]:
    """Return the trajectories in the order of `leaves`. Those of a prompt have the sample indices 0, 1, ..."""
    groups: dict[int, list[Trajectory]] = {}
    made = []
    for leaf in leaves:
        group = groups.setdefault(leaf.prompt, [])
        parent = group[leaf.parent % len(group)] if group and leaf.parent is not None else None
        shared = parent.turns[: min(leaf.num_shared, parent.num_process_turns, MAX_TURNS)] if parent else []
        if parent and len(shared) == len(parent.turns):  # a branch leaves its parent before the parent's end
            shared = shared[:-1]
        own = leaf.entropies[: MAX_TURNS + 1 - len(shared)]
        turns = [
            Turn(
                tokens=[len(made), place],
                rollout_logprobs=[-entropy, -entropy],
                calls=[Call(tool="search", arguments="q")] * is_process,
            )
            for place, entropy in enumerate(own)
            for is_process in [
                place < len(own) - 1 or (not leaf.final and len(shared) + len(own) <= MAX_TURNS)
            ]
        ]
        branch = parent and Branch(
            parent=parent.sample_index, root=parent.root, owners=tuple(parent.owners[: len(shared)])
        )
        trajectory = Trajectory(
            prompt_index=leaf.prompt,
            prompt_id="",
            sample_index=len(group),
            prompt_tokens=[0],
            turns=[*shared, *turns],
            stop_reason="answer",
            outcome_reward=leaf.outcome,
            branch=branch,
        )
        group.append(trajectory)
        made.append(trajectory)
    return made


def computed(trajectories: list[Trajectory], name: str, **fields) -> TurnAdvantages:
    table = build_turn_table(trajectories, num_prompts=NUM_PROMPTS, max_turns=MAX_TURNS, keep_single=False)
    return compute_advantages(table, AlgorithmConfig(advantage=name, **fields), dp_group=None)


def rows_of(values: torch.Tensor, trajectories: list[Trajectory]) -> list[list[float]]:
    """Return the values of each trajectory's turns. The values past its last turn must be 0."""
    for row, trajectory in zip(values, trajectories, strict=True):
        assert not row[len(trajectory.turns) :].any()
    return [row[: len(t.turns)].tolist() for row, t in zip(values, trajectories, strict=True)]
