"""Banked rollouts come back for the step, weights and configuration they were played with, and for no other."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from saved_run import Run, world

from a2tgpo.collect.bank import RolloutBank, drop_covered
from a2tgpo.collect.carried_pool import Carried, Entry
from a2tgpo.collect.state import RolloutState
from a2tgpo.collect.step import PlayedStep
from a2tgpo.config.reward import RewardConfig
from a2tgpo.config.rollout import RolloutConfig
from a2tgpo.config.run import CheckpointConfig
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.parallel.engine_group import ALONE
from a2tgpo.rollout.carried_group import CarriedGroup
from a2tgpo.trajectory import Call, Prompt, Trajectory, Turn, encode_records

__all__ = ["world"]


def played() -> list[Trajectory]:
    turns = [
        Turn(
            tokens=[5, 6],
            rollout_logprobs=[-0.1, -1e-17],
            observation_tokens=[7],
            calls=[Call(tool="search", arguments="x")],
            info_gain=0.1 + 0.2,
        ),
        Turn(tokens=[8], rollout_logprobs=[-math.inf]),
    ]
    trajectory = Trajectory(
        prompt_index=0, prompt_id="q", sample_index=1, prompt_tokens=[1, 2], turns=turns, stop_reason="answer"
    )
    return [trajectory]


class Start:
    """The objects of one start of the run."""

    def __init__(self, world: SimpleNamespace, root: Path, *, questions: str = "", **changes: Any):
        config = dataclasses.replace(Run(world, root).config, **changes)
        self.policy = world.parts.policy
        self.state = RolloutState(sampler=world.parts.state.sampler)
        self.state.sampler.load_state_dict(self.state.sampler.state_dict() | {"position": 0, "epoch": 0})
        self.bank = RolloutBank(root / "bank", config, self.state, world.groups, ALONE, questions=questions)

    def take(self, step: int = 3) -> PlayedStep | None:
        return self.bank.take(step, self.policy)


@pytest.fixture
def banked(world, tmp_path) -> dict[str, float]:
    """Put the rollouts of step 3 on disk, and return its metrics."""
    first = Start(world, tmp_path)
    assert first.take() is None
    metrics = MetricSums()
    metrics.add("reward", 0.1 + 0.2, 3)
    metrics.add_max("gap", 1e-300)
    first.state.sampler.next_indices()
    first.bank.put(3, PlayedStep(trajectories=played(), metrics=metrics))
    return metrics.values()


def test_the_same_step_goes_on_with_rollouts_metrics_and_sampler(world, tmp_path, banked):
    again = Start(world, tmp_path, checkpoint=CheckpointConfig(every=7))
    found = again.take()
    assert found is not None and (found.trajectories, found.metrics.values()) == (played(), banked)
    assert again.state.sampler.state_dict()["position"] == 2


def test_what_is_carried_over_is_put_back_with_the_step(world, tmp_path):
    first = Start(world, tmp_path)
    assert first.take() is None
    prompt = Prompt(index=1, id="q", question="?", answers=("a",), tokens=(1, 2))
    group = CarriedGroup(begun=3, question=7, prompt=prompt, trajectories=played())
    held = Carried(entries=(Entry(begun=3, index=1, question=7, engine=0),), own=(group,))
    first.state.carried = held
    first.bank.put(3, PlayedStep(trajectories=played(), metrics=MetricSums()))
    again = Start(world, tmp_path)
    found = again.take()
    assert found is not None and found.trajectories == played()
    assert again.state.carried == held


def test_another_step_or_configuration_plays_anew(world, tmp_path, banked):
    assert Start(world, tmp_path).take(step=2) is None
    assert Start(world, tmp_path, rollout=RolloutConfig(temperature=0.9)).take() is None
    assert Start(world, tmp_path, questions="with other answers").take() is None


def test_an_edited_reward_file_plays_anew(world, tmp_path):
    file = tmp_path / "my.py"
    file.write_text("def f(episode): return 1\n")
    reward = RewardConfig(names=(f"{file}:f",))
    first = Start(world, tmp_path, reward=reward)
    assert first.take() is None
    first.bank.put(3, PlayedStep(trajectories=played(), metrics=MetricSums()))
    assert Start(world, tmp_path, reward=reward).take() is not None
    file.write_text("def f(episode): return 2\n")
    assert Start(world, tmp_path, reward=reward).take() is None


def test_rollouts_without_a_verdict_are_not_banked(world, tmp_path):
    first = Start(world, tmp_path)
    assert first.take() is None
    (unjudged,) = played()
    unjudged.reward_error = "judge: no verdict"
    first.bank.put(3, PlayedStep(trajectories=[*played(), unjudged], metrics=MetricSums()))
    assert Start(world, tmp_path).take() is None


def test_other_weights_play_anew_also_where_one_bit_differs(world, tmp_path, banked):
    weight = next(world.parts.policy.gpt_models[0].parameters())
    with torch.no_grad():
        value = weight.view(-1)[0].clone()
        weight.view(-1)[0] = torch.nextafter(value, torch.tensor(9.0))
        assert Start(world, tmp_path).take() is None
        weight.view(-1)[0] = value
    assert Start(world, tmp_path).take() is not None


@pytest.mark.parametrize("place", [0, 40, -1])
def test_a_damaged_file_is_passed_over(world, tmp_path, banked, place):
    path = tmp_path / "bank/step_3/replica_0.bin"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert Start(world, tmp_path).take() is None
    path.write_bytes(content[:50])
    assert Start(world, tmp_path).take() is None


@pytest.mark.parametrize(
    ("name", "said"),
    [("rank_0.bin", "step_3, written by an earlier version"), ("replica_0.bin", "by another version")],
)
def test_rollouts_of_another_version_are_passed_over_with_one_line(world, tmp_path, caplog, name, said):
    path = tmp_path / "bank/step_3" / name
    path.parent.mkdir(parents=True)
    payload = encode_records({"key": "step 3"})
    path.write_bytes(hashlib.blake2b(payload, digest_size=32).digest() + payload)
    assert Start(world, tmp_path).take() is None
    assert [said in record.message for record in caplog.records] == [True]


def test_a_checkpoint_removes_the_steps_it_covers(world, tmp_path, banked):
    drop_covered(tmp_path / "bank", 2)
    assert (tmp_path / "bank/step_3").exists()
    drop_covered(tmp_path / "bank", 3)
    assert not (tmp_path / "bank/step_3").exists()


def test_a_bank_that_cannot_be_written_costs_a_metric_not_the_run(world, tmp_path):
    (tmp_path / "bank").write_text("in the way")
    start = Start(world, tmp_path)
    start.take()
    metrics = MetricSums()
    start.bank.put(3, PlayedStep(trajectories=played(), metrics=metrics))
    assert metrics.values() == {"rollout/not_banked": 1.0}
