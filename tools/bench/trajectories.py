"""Make synthetic trajectories with prescribed lengths, for the benches of training."""

from __future__ import annotations

import random

from a2tgpo.trajectory import Call, LogProbs, TokenIds, Trajectory, Turn

GROUP_SIZE = 16


def make_trajectories(
    count: int,
    *,
    mean_tokens: int,
    spread: float = 0.35,
    max_turns: int = 6,
    observed: float = 0.6,
    vocab_size: int = 1000,
    seed: int = 0,
) -> list[Trajectory]:
    """Make `count` trajectories of about `mean_tokens` tokens, in groups of 16. Equal arguments give equal results.

    Args:
        spread: standard deviation of the length, divided by the mean length.
        max_turns: largest number of process turns. Every trajectory has at least one process turn, and a final turn.
        observed: share of observation tokens among a trajectory's tokens after the prompt.
    """
    rng = random.Random(seed)

    def tokens(length: float) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(max(1, round(length)))]

    made = []
    for number in range(count):
        length = max(64.0, rng.gauss(mean_tokens, spread * mean_tokens))
        process_turns = rng.randint(1, max_turns)
        prompt = tokens(0.1 * length)
        response = length - len(prompt)
        turns = []
        for turn in range(process_turns + 1):
            is_final = turn == process_turns
            written = tokens(response * (1 - observed) / (process_turns + 1))
            turns.append(
                Turn(
                    tokens=TokenIds(written),
                    rollout_logprobs=LogProbs([-rng.random() for _ in written]),
                    observation_tokens=TokenIds(
                        [] if is_final else tokens(response * observed / process_turns)
                    ),
                    calls=[] if is_final else [Call(tool="search", arguments=f"query {rng.randrange(5)}")],
                    info_gain=None if is_final else rng.gauss(0.1, 0.3),
                )
            )
        made.append(
            Trajectory(
                prompt_index=number // GROUP_SIZE,
                prompt_id=str(number // GROUP_SIZE),
                sample_index=number % GROUP_SIZE,
                prompt_tokens=TokenIds(prompt),
                turns=turns,
                stop_reason="answer",
                outcome_reward=float(rng.choice([-1, 0, 1])),
            )
        )
    return made
