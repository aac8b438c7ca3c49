"""Check partial rollouts and the bank on 2 ranks. The ranks take the same decisions, although they have different
data.

    torchrun --nproc-per-node 2 partial_worker.py FOLDER

Results go to FOLDER/results.json.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from claims import Claims

from a2tgpo.collect.bank import RolloutBank
from a2tgpo.collect.partial import PartialRollout
from a2tgpo.collect.state import RolloutState
from a2tgpo.collect.step import PlayedStep
from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.config.correction import CorrectionConfig
from a2tgpo.config.data import DataConfig
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.rollout import PartialConfig, RolloutConfig
from a2tgpo.config.run import RunConfig, RunSettings
from a2tgpo.config.search import SearchConfig
from a2tgpo.data.sampler import PromptSampler
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.parallel.collectives import all_gather_object
from a2tgpo.parallel.engine_group import EngineGroup
from a2tgpo.rollout.carried_group import CarriedGroup
from a2tgpo.rollout.counts import RolloutCounts
from a2tgpo.rollout.group_rollout import RolloutInterruptedError
from a2tgpo.trajectory import Prompt, Trajectory, Turn


def prompts(indices: Sequence[int], positions: Sequence[int]) -> list[Prompt]:
    return [
        Prompt(index=place, id=str(indices[place]), question="?", answers=("a",), tokens=(1,))
        for place in positions
    ]


PROMPTS: Any = SimpleNamespace(prompts=prompts)


class Played:
    """A replacement of `RewardedRollout`. Each call plays one turn, and only groups without a budget end."""

    def __init__(self, should_stop: Callable[[], bool]):
        self.should_stop = should_stop

    def play_on(
        self, groups: Sequence[CarriedGroup], *, budgets: Sequence[int | None], version: int, **_: Any
    ) -> list[CarriedGroup]:
        if self.should_stop():
            raise RolloutInterruptedError
        played = []
        for group, budget in zip(groups, budgets, strict=True):
            turns = [turn for member in group.trajectories for turn in member.turns]
            member = Trajectory(
                prompt_index=group.prompt.index,
                prompt_id=group.prompt.id,
                sample_index=0,
                prompt_tokens=[1],
                turns=[*turns, Turn(tokens=[1], rollout_logprobs=[0.0], version=version)],
                stop_reason="answer" if budget is None else "",
            )
            played.append(dataclasses.replace(group, trajectories=[member]))
        return played


class Mixed(Played):
    """Plays groups of two trajectories. The two rewards differ for every second question."""

    def play_on(self, groups: Sequence[CarriedGroup], **rest: Any) -> list[CarriedGroup]:
        played = []
        for group in super().play_on(groups, **rest):
            first, is_mixed = group.trajectories[0], group.question % 2
            second = dataclasses.replace(first, sample_index=1, task_reward=float(is_mixed))
            played.append(dataclasses.replace(group, trajectories=[first, second]))
        return played


def run_config(root: Path) -> RunConfig:
    return RunConfig(
        run=RunSettings(name="r", root=str(root)),
        model=ModelConfig(path="unused"),
        data=DataConfig(train="unused", test="unused"),
        search=SearchConfig(corpus="unused"),
        rollout=RolloutConfig(partial=PartialConfig(tokens_per_step=1, extra_prompts=4)),
        algorithm=AlgorithmConfig(correction=CorrectionConfig(kind="mask")),
    )


def new_state(config: RunConfig) -> RolloutState:
    return RolloutState(sampler=PromptSampler(500, config.rollout.prompts_per_step, seed=0))


def new_policy() -> Any:
    return SimpleNamespace(chunks=[torch.nn.Linear(2, 2, bias=False)], wrapped_chunks=[])


def member_of(prompt_id: str, token: int) -> Trajectory:
    return Trajectory(
        prompt_index=0,
        prompt_id=prompt_id,
        sample_index=0,
        prompt_tokens=[1],
        turns=[Turn(tokens=[token], rollout_logprobs=[0.0])],
        stop_reason="eos",
    )


def check_a_second_wave_is_broken_off_on_all_ranks_or_on_none(root: Path, rank: int) -> None:
    config = run_config(root)
    for stopped_rank in (None, 0, 1):
        state, calls = new_state(config), []

        def should_stop(stopped_rank: int | None = stopped_rank, calls: list[int] = calls) -> bool:
            calls.append(1)
            return len(calls) == 2 and rank == stopped_rank

        rollout: Any = Played(should_stop)
        partial = PartialRollout(config.rollout, rollout, PROMPTS, state, EngineGroup(index=rank, count=2))
        found = partial.play(0, RolloutCounts(), MetricSums())
        assert len(calls) == 2, "no second wave"
        if stopped_rank is not None:
            assert found is None and not state.carried.entries
        else:
            assert found is not None and len(found) == 32 and len(state.carried.own) == 2


def check_ranks_agree_on_the_groups_that_dynamic_sampling_drops(root: Path, rank: int) -> None:
    config = run_config(root)
    rollout = dataclasses.replace(config.rollout, prompts_per_step=8, dynamic_sampling=True)
    state, mixed = new_state(config), cast(Any, Mixed(lambda: False))
    partial = PartialRollout(rollout, mixed, PROMPTS, state, EngineGroup(index=rank, count=2))
    for version in range(4):
        metrics = MetricSums()
        share = partial.play(version, RolloutCounts(), metrics)
        assert share is not None
        parts = all_gather_object((share, state.carried.entries), dist.group.WORLD)
        assert all(entries == state.carried.entries for _, entries in parts), "the ranks carry other groups"
        step = sorted((t for part, _ in parts for t in part), key=lambda t: (t.prompt_index, t.sample_index))
        assert [(t.prompt_index, t.sample_index) for t in step] == list(itertools.product(range(8), range(2)))
        assert all(int(t.prompt_id) % 2 for t in step), "a dropped group is in the step"
        assert all(part for part, _ in parts), "an engine has no group in the step"
        assert metrics.values()["sampling/unfilled_groups"] == 0


def bank_of(folder: Path, rank: int, state: RolloutState, engine_group: EngineGroup) -> RolloutBank:
    groups: Any = SimpleNamespace(rank=rank, world_size=2)
    return RolloutBank(folder, run_config(folder), state, groups, engine_group)


def check_banks_of_two_attempts_are_not_mixed(root: Path, rank: int) -> None:
    torch.manual_seed(0)
    policy, state = new_policy(), new_state(run_config(root))

    def played_step(name: str, *, is_kept: bool) -> PlayedStep | None:
        bank = bank_of(root / "bank", rank, state, EngineGroup(index=rank, count=2))
        found = bank.take(3, policy)
        if found is None and is_kept:
            bank.put(3, PlayedStep(trajectories=[member_of(name, rank)], metrics=MetricSums()))
        dist.barrier()
        return found

    assert played_step("first", is_kept=rank == 0) is None, "there was nothing"
    assert played_step("second", is_kept=rank == 1) is None, "rank 1 had nothing"
    assert played_step("third", is_kept=True) is None, "each rank had one, of different attempts"
    found = played_step("fourth", is_kept=True)
    assert found is not None and found.trajectories[0].prompt_id == "third"


def check_a_shared_engine_banks_one_file_with_what_is_each_ranks_own(root: Path, rank: int) -> None:
    torch.manual_seed(rank)  # as with tensor parallelism, each rank has different weights
    policy, state = new_policy(), new_state(run_config(root))

    def bank() -> RolloutBank:
        return bank_of(root / "shared", rank, state, EngineGroup(rank=rank, group=dist.group.WORLD))

    first = bank()
    assert first.take(3, policy) is None
    metrics = MetricSums()
    metrics.add("asked of", rank, 1)
    member = member_of("q", 7)
    state.sampler.next_indices()
    behind = state.sampler.state_dict()
    first.put(3, PlayedStep(trajectories=[member] if rank == 0 else [], metrics=metrics))
    dist.barrier()
    assert [path.name for path in (root / "shared/step_3").iterdir()] == ["replica_0.bin"]

    state.sampler.next_indices()
    found = bank().take(3, policy)
    assert found is not None and found.trajectories == ([member] if rank == 0 else [])
    assert found.metrics.values() == {"asked of": rank} and state.sampler.state_dict() == behind
    if rank == 1:
        torch.nn.init.zeros_(policy.chunks[0].weight)
    assert bank().take(3, policy) is None, "rank 1 has other weights"


CHECKS = (
    check_a_second_wave_is_broken_off_on_all_ranks_or_on_none,
    check_ranks_agree_on_the_groups_that_dynamic_sampling_drops,
    check_banks_of_two_attempts_are_not_mixed,
    check_a_shared_engine_banks_one_file_with_what_is_each_ranks_own,
)

if __name__ == "__main__":
    folder, claims = Path(sys.argv[1]), Claims()
    dist.init_process_group("gloo")
    for check in CHECKS:
        claims.check(check.__name__.removeprefix("check_"), check, folder, dist.get_rank())
    claims.save(folder / "results.json")
    dist.destroy_process_group()
