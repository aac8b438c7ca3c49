"""Run under torchrun on 2 ranks: partial rollouts and the bank decide alike on ranks that see different things."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from a2tgpo.collect.bank import RolloutBank
from a2tgpo.collect.carried_pool import CarriedPool
from a2tgpo.collect.partial import PartialRollout
from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.config.correction import CorrectionConfig
from a2tgpo.config.data import DataConfig
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.rollout import PartialConfig, RolloutConfig
from a2tgpo.config.run import RunConfig, RunSettings
from a2tgpo.config.search import SearchConfig
from a2tgpo.data.sampler import PromptSampler
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.rollout.carried_group import CarriedGroup
from a2tgpo.rollout.counts import RolloutCounts
from a2tgpo.rollout.multi_turn import RolloutCutError
from a2tgpo.trajectory import Prompt, Trajectory, Turn


def prompts(indices: Sequence[int], positions: Sequence[int]) -> list[Prompt]:
    return [
        Prompt(index=place, id=str(indices[place]), question="?", answers=("a",), tokens=(1,))
        for place in positions
    ]


class Played:
    """Stands in for `GroupRollout`: a turn per call, and an end only for groups without a budget."""

    def play_on(
        self,
        groups: Sequence[CarriedGroup],
        *,
        budgets: Sequence[int | None],
        step: int,
        is_cut: Callable[[], bool] | None,
        progress: Callable[[int, int], None] | None,
        **_: Any,
    ) -> tuple[list[CarriedGroup], RolloutCounts]:
        if is_cut is not None and is_cut():
            raise RolloutCutError
        played = []
        for group, budget in zip(groups, budgets, strict=True):
            turns = [turn for member in group.trajectories for turn in member.turns]
            member = Trajectory(
                prompt_index=group.prompt.index,
                prompt_id=group.prompt.id,
                sample_index=0,
                prompt_tokens=[1],
                turns=[*turns, Turn(tokens=[1], rollout_logprobs=[0.0], step=step)],
                stop_reason="answer" if budget is None else "",
            )
            played.append(dataclasses.replace(group, trajectories=[member]))
            if member.stop_reason and progress is not None:
                progress(1, 1)
        return played, RolloutCounts()


def run_parts(root: Path, rank: int) -> Any:
    config = RunConfig(
        run=RunSettings(name="r", root=str(root)),
        model=ModelConfig(path="unused"),
        data=DataConfig(train="unused", test="unused"),
        search=SearchConfig(corpus="unused"),
        rollout=RolloutConfig(partial=PartialConfig(tokens_per_step=1, extra_prompts=4)),
        algorithm=AlgorithmConfig(correction=CorrectionConfig(kind="mask")),
    )
    return SimpleNamespace(
        config=config,
        groups=SimpleNamespace(rank=rank, world_size=2),
        replicas=SimpleNamespace(index=rank, count=2, is_first=True, group=None),
        sampler=PromptSampler(500, config.rollout.prompts_per_step, seed=0),
        carried=CarriedPool(),
        train_prompts=SimpleNamespace(prompts=prompts),
        rollout=Played(),
        phases=SimpleNamespace(enter=lambda name: None),
        policy=SimpleNamespace(chunks=[torch.nn.Linear(2, 2, bias=False)]),
    )


def check_a_second_wave_is_broken_off_on_all_ranks_or_on_none(root: Path, rank: int) -> None:
    for cut_rank in (None, 0, 1):
        parts = run_parts(root, rank)
        calls: list[int] = []
        ended: list[tuple[int, int]] = []

        def is_cut(cut_rank: int | None = cut_rank, calls: list[int] = calls) -> bool:
            calls.append(1)
            return len(calls) == 2 and rank == cut_rank

        found = PartialRollout(parts).play(
            0,
            RolloutCounts(),
            MetricSums(),
            is_cut,
            progress=lambda *counts, ended=ended: ended.append(counts),
        )
        assert len(calls) == 2, "no second wave"
        if cut_rank is not None:
            assert found is None and not parts.carried.state.entries
        else:
            assert found is not None and len(found) == len(ended) == 32 and len(parts.carried.state.own) == 2


def check_banks_of_two_attempts_are_not_mixed(root: Path, rank: int) -> None:
    torch.manual_seed(0)
    parts = run_parts(root, rank)

    def played_step(name: str, *, is_kept: bool) -> list[Trajectory] | None:
        bank = RolloutBank(root / "bank", parts)
        found = bank.take(3, MetricSums())
        if found is None and is_kept:
            turn = Turn(tokens=[rank], rollout_logprobs=[0.0])
            member = Trajectory(
                prompt_index=0,
                prompt_id=name,
                sample_index=0,
                prompt_tokens=[1],
                turns=[turn],
                stop_reason="eos",
            )
            bank.put(3, [member], MetricSums())
        dist.barrier()
        return found

    assert played_step("first", is_kept=rank == 0) is None, "there was nothing"
    assert played_step("second", is_kept=rank == 1) is None, "rank 1 had nothing"
    assert played_step("third", is_kept=True) is None, "each rank had one, of different attempts"
    found = played_step("fourth", is_kept=True)
    assert found is not None and found[0].prompt_id == "third"


def check_a_shared_engine_banks_one_file_with_what_is_each_ranks_own(root: Path, rank: int) -> None:
    torch.manual_seed(rank)  # as with tensor parallelism, each rank has weights of its own
    parts = run_parts(root, rank)
    parts.replicas = SimpleNamespace(index=0, count=1, is_first=rank == 0, group=dist.group.WORLD)
    bank = RolloutBank(root / "shared", parts)
    assert bank.take(3, MetricSums()) is None
    metrics = MetricSums()
    metrics.add("asked of", rank, 1)
    turn = Turn(tokens=[7], rollout_logprobs=[0.0])
    member = Trajectory(
        prompt_index=0, prompt_id="q", sample_index=0, prompt_tokens=[1], turns=[turn], stop_reason="eos"
    )
    parts.sampler.next_indices()
    behind = parts.sampler.state_dict()
    bank.put(3, [member] if rank == 0 else [], metrics)
    dist.barrier()
    assert [path.name for path in (root / "shared/step_3").iterdir()] == ["replica_0.bin"]

    parts.sampler.next_indices()
    found = MetricSums()
    assert RolloutBank(root / "shared", parts).take(3, found) == ([member] if rank == 0 else [])
    assert found.values() == {"asked of": rank} and parts.sampler.state_dict() == behind
    if rank == 1:
        torch.nn.init.zeros_(parts.policy.chunks[0].weight)
    assert RolloutBank(root / "shared", parts).take(3, MetricSums()) is None, "rank 1 has other weights"


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for check in (
        check_a_second_wave_is_broken_off_on_all_ranks_or_on_none,
        check_banks_of_two_attempts_are_not_mixed,
        check_a_shared_engine_banks_one_file_with_what_is_each_ranks_own,
    ):
        check(Path(sys.argv[1]), dist.get_rank())
        dist.barrier()
    if dist.get_rank() == 0:
        print("ALL CHECKS PASSED")
    dist.destroy_process_group()
