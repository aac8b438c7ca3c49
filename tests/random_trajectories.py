"""Trajectories of random tokens, for tests of mixtures of experts."""

from collections.abc import Callable

import numpy as np

from a2tgpo.batch.packing import packed_length
from a2tgpo.trajectory import Trajectory, Turn


def random_trajectories(experts_of: Callable[[int, np.random.Generator, int], bytes]) -> list[Trajectory]:
    """Return four trajectories of one turn each, with 5 tokens of prompt and 20, 27, 34 and 41 sampled tokens.

    Args:
        experts_of: maps the number of a trajectory, a random generator and the trajectory's length to the rows of
            experts (`Turn.experts`).
    """
    rng, made = np.random.default_rng(0), []
    for number in range(4):
        sampled = 20 + 7 * number
        turn = Turn(tokens=rng.integers(3, 250, sampled).tolist(), rollout_logprobs=[-1.0] * sampled)
        trajectory = Trajectory(
            prompt_index=0,
            prompt_id="q",
            sample_index=number,
            prompt_tokens=rng.integers(3, 250, 5).tolist(),
            turns=[turn],
            stop_reason="eos",
        )
        turn.experts = experts_of(number, rng, packed_length(trajectory))
        made.append(trajectory)
    return made
