"""Fixtures: a process group of one process with a tiny trainable policy, and the trajectories of a step."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
from tiny_models import build_model

from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.update import UpdateConfig
from a2tgpo.model.build import Policy, build_policy
from a2tgpo.parallel.initialize import initialize, shutdown
from a2tgpo.trajectory import Call, Trajectory, Turn

VOCAB = 250


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Iterator[Policy]:
    environment = dict(os.environ)
    groups = initialize(ParallelConfig(), seed=0)
    folder = tmp_path_factory.mktemp("policy")
    build_model("qwen3", vocab_size=VOCAB).save_pretrained(folder)
    model = ModelConfig(path=str(folder), dtype="float32")
    yield build_policy(model, ParallelConfig(), groups, update=UpdateConfig(lr=1e-3))
    shutdown()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def trajectories() -> list[Trajectory]:
    """Return two rollouts of each of four prompts, with up to three turns. One has no sampled tokens. Some answers
    match.
    """
    rng = random.Random(3)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(VOCAB) for _ in range(rng.randint(low, high))]

    def turn(is_final: bool) -> Turn:
        sampled = tokens(1, 9)
        return Turn(
            tokens=sampled,
            rollout_logprobs=[-8 * rng.random() for _ in sampled],
            observation_tokens=[] if is_final else tokens(1, 6),
            calls=[] if is_final else [Call(tool="search", arguments="q")],
        )

    made = [
        Trajectory(
            prompt_index=number // 2,
            prompt_id=str(number // 2),
            sample_index=number % 2,
            prompt_tokens=tokens(2, 8),
            turns=[turn(t == number % 3) for t in range(number % 3 + 1)],
            stop_reason="answer",
            exact_match=float(number in (1, 2, 6)),
        )
        for number in range(8)
    ]
    made[5].turns = []
    rng.shuffle(made)
    return made
