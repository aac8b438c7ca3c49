"""Check that every method's advantages do not depend on how the rollouts are spread over 4 ranks.

    torchrun --nproc-per-node 4 advantage_worker.py RESULTS.json

Random spreads are compared with one process that has all rollouts. In another spread, sums are computed in another
order, so their last bits differ. If the members of a group were otherwise equal, this difference would be divided by
the smallest allowed standard deviation. Therefore all gains are of ordinary size and different from each other, and
discounts are powers of two.
"""

import dataclasses
import random
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from claims import Claims

from a2tgpo.advantage.estimator import compute_advantages
from a2tgpo.advantage.turn_table import build_turn_table
from a2tgpo.config.algorithm import OF_INNER_BRANCHES, OF_TREES, AlgorithmConfig
from a2tgpo.config.method_part import ADVANTAGE
from a2tgpo.trajectory import Branch, Call, Trajectory, Turn

NUM_PROMPTS, GROUP_SIZE, MAX_TURNS = 6, 8, 5
NUM_RANDOM_DEALS = 4
LIMIT = 1e-12
"""Largest allowed difference, relative to the largest value of the batch or to 1."""


def all_trajectories(seed: int) -> list[Trajectory]:
    rng = random.Random(seed)
    made = []
    for prompt in range(NUM_PROMPTS - 1):  # the last prompt has no rollout on any rank
        for sample in range(GROUP_SIZE if prompt else 1):  # the first prompt has a single rollout
            turns = [
                Turn(
                    tokens=[1],
                    rollout_logprobs=[-0.5],
                    calls=[Call(tool="search", arguments=rng.choice(["river", "lake"]))],
                    observation_tokens=[rng.randrange(2)],
                    info_gain=None if rng.random() < 0.1 else rng.gauss(0.1, 0.3),
                )
                for _ in range(rng.randint(0, MAX_TURNS))
            ]
            if not turns or rng.random() < 0.9:  # otherwise the rollout ends after an observation
                turns.append(Turn(tokens=[2], rollout_logprobs=[-0.5]))
            made.append(
                Trajectory(
                    prompt_index=prompt,
                    prompt_id="",
                    sample_index=sample,
                    prompt_tokens=[0],
                    turns=turns,
                    stop_reason="answer",
                    outcome_reward=rng.choice([-1.0, 0.0, 1.0]),
                )
            )
    return made


def as_trees(trajectories: list[Trajectory]) -> list[Trajectory]:
    """Return the trajectories. Those with a sample index of 3 or more are now branches of earlier ones."""
    made: list[Trajectory] = []
    for trajectory in trajectories:
        group = [other for other in made if other.prompt_index == trajectory.prompt_index]
        if trajectory.sample_index >= 3:
            parent = group[7 * trajectory.sample_index % len(group)]
            owners = tuple(parent.owners[: min(len(parent.turns) - 1, 2)])
            own = [
                dataclasses.replace(turn, rollout_logprobs=[-(len(made) % 7) / 4])
                for turn in trajectory.turns[len(owners) - MAX_TURNS :]
            ]
            turns = [*parent.turns[: len(owners)], *own]
            branch = Branch(parent=parent.sample_index, root=parent.root, owners=owners)
            trajectory = dataclasses.replace(trajectory, turns=turns, branch=branch)
        made.append(trajectory)
    return made


def with_inner_branches(trajectories: list[Trajectory], seed: int) -> list[Trajectory]:
    """Return the trajectories with up to three inner branches each, whose outcomes differ."""
    rng = random.Random(seed)
    made = []
    for t in trajectories:
        numbers = [rng.randrange(len(t.turns)) for _ in range(rng.randrange(4))]
        inner = [
            dataclasses.replace(
                t,
                turns=t.turns[: number + 1],
                branch=Branch(parent=t.sample_index, root=t.sample_index, owners=(0,) * number, num_tokens=1),
                outcome_reward=rng.gauss(0, 1),
            )
            for number in numbers
        ]
        made.append(dataclasses.replace(t, inner_branches=inner))
    return made


def deals(trajectories: list[Trajectory], num_ranks: int) -> list[list[int]]:
    """Return several deals. A deal lists the owner of each trajectory."""
    named = [
        *([rank] * len(trajectories) for rank in range(num_ranks)),
        [t.prompt_index % num_ranks for t in trajectories],
        [t.sample_index % num_ranks for t in trajectories],
        [num_ranks - 1 if place else 0 for place in range(len(trajectories))],
    ]
    for seed in range(NUM_RANDOM_DEALS):
        rng = random.Random(seed)
        owners = rng.sample(
            range(num_ranks), rng.randint(1, num_ranks)
        )  # the other ranks get no trajectories
        named.append([rng.choice(owners) for _ in trajectories])
    return named


def check(name: str) -> None:
    for seed in (0, 1):
        for fields in ({}, {"gamma": 0.5}, {"normalize_by_std": False}):
            config = AlgorithmConfig(advantage=name, **fields)
            check_deals(all_trajectories(seed), config)
            if name in OF_TREES:
                check_deals(as_trees(all_trajectories(seed)), config)
            if name in OF_INNER_BRANCHES:
                check_deals(with_inner_branches(all_trajectories(seed), seed), config)


def check_deals(trajectories: list[Trajectory], config: AlgorithmConfig) -> None:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    whole = compute_advantages(table_of(trajectories), config, dp_group=None)
    for number, owners in enumerate(deals(trajectories, num_ranks)):
        mine = [place for place, owner in enumerate(owners) if owner == rank]
        random.Random(number).shuffle(mine)
        share = table_of([trajectories[place] for place in mine])
        spread = compute_advantages(share, config, dp_group=dist.group.WORLD)
        for field in ("advantages", "normalized_gain", "normalized_outcome", "gain_spread"):
            expect = getattr(whole, field)
            if expect is None:
                continue
            got = getattr(spread, field)
            assert got.shape == expect[mine].shape
            if mine:
                error = ((got - expect[mine]).abs().max() / expect.abs().max().clamp(min=1.0)).item()
                assert error <= LIMIT, (field, number, error)
        for place, offsets in zip(mine, spread.token_offsets or (), strict=False):
            error = (offsets - whole.token_offsets[place]).abs().max().item()
            assert error <= LIMIT, ("token_offsets", number, error)


def table_of(trajectories: list[Trajectory]):
    return build_turn_table(trajectories, num_prompts=NUM_PROMPTS, max_turns=MAX_TURNS)


def main(out: str) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.set_num_threads(1)
    claims = Claims()
    for name in ADVANTAGE.names():
        claims.check(name, check, name)
    claims.save(out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
