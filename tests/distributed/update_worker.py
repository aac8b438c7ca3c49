"""Run all checks of test_update.py in one launch of 4 ranks, and write FOLDER/results.json.

    torchrun --nproc-per-node 4 update_worker.py FOLDER

A check is a function of a `Bench`. It raises AssertionError on the ranks that see a fault.
"""

from __future__ import annotations

import gc
import math
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from checkpoint_checks import (
    check_another_layout,
    check_earlier_format,
    check_earlier_format_of_another_layout,
    check_host_memory,
    check_resume,
    check_resume_bfloat16,
    check_resume_whole_optimizer,
    check_resume_with_buckets,
    check_retention,
    check_values_of_another_layout,
)
from claims import Claims
from layout_checks import (
    check_correction,
    check_entropy,
    check_gradients,
    check_output_rows,
    check_probes,
    check_scores,
    check_sequence_objectives,
    check_turn_ratios,
    check_update,
)
from lora_checks import (
    check_adapter_update,
    check_adapters,
    check_fresh_adapters,
    check_resume_adapters,
    check_resume_adapters_elsewhere,
    check_resume_adapters_with_buckets,
)
from torch import Tensor
from update_bench import Bench, assert_close, hf_weights, make_model, make_reference, make_trajectories

from a2tgpo.collect.state import RolloutState
from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.config.data import DataConfig
from a2tgpo.config.guard import GuardConfig
from a2tgpo.config.lora import LoraConfig
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.run import RunConfig, RunSettings
from a2tgpo.config.search import SearchConfig
from a2tgpo.config.update import ExtrapolationConfig
from a2tgpo.data.sampler import PromptSampler
from a2tgpo.loss.clip_cov import clip_covariance
from a2tgpo.loss.entropy import EntropyWeight
from a2tgpo.memory.phases import MemoryPhases
from a2tgpo.metrics.guards import Guards
from a2tgpo.parallel.collectives import broadcast_object
from a2tgpo.parallel.engine_group import EngineGroup
from a2tgpo.parallel.initialize import initialize, shutdown
from a2tgpo.run.checkpoints import RunCheckpoints
from a2tgpo.run.folder import RunFolder
from a2tgpo.update.extrapolation import Extrapolation
from a2tgpo.update.extrapolation_gate import ExtrapolationGate
from a2tgpo.update.logprobs import compute_logprobs
from a2tgpo.update.optimizer import build_optimizer
from a2tgpo.update.train_step import train_step

# -- checks on several layouts --------------------------------------------------------------------------------


def check_nan_is_skipped(bench: Bench) -> None:
    """A NaN on one replica leaves the weights and the optimizer state of all ranks unchanged."""
    results = {}
    for with_nan in (False, True):
        policy, update = bench.policy(distributed_optimizer=True)
        optimizer, _ = build_optimizer(policy, update, total_steps=10)
        bench.step(policy, optimizer)
        if with_nan:
            batches = bench.batches()
            sound = bench.loss_function(batches)

            def broken(number: int, logprobs: Tensor, entropy: Tensor, sound: Any = sound) -> Any:
                loss, metrics = sound(number, logprobs, entropy)
                return loss * (math.nan if bench.groups.dp_rank == bench.groups.dp_size - 1 else 1), metrics

            before = hf_weights(policy)
            result = train_step(policy, optimizer, batches, broken)
            assert not result.update_ok and math.isnan(result.loss) and math.isnan(result.grad_norm)
            assert_close(hf_weights(policy), before, 0)
        assert bench.step(policy, optimizer).update_ok
        results[with_nan] = hf_weights(policy)
    assert_close(results[True], results[False], 0)


def check_memory_phases(bench: Bench, **options: Any) -> None:
    """If the whole state leaves the GPU and comes back between steps, the results are equal to the bit."""
    results = {}
    for moves in (False, True):
        policy, update = bench.policy(distributed_optimizer=True, clip_grad=0.05, **options)
        optimizer, _ = build_optimizer(policy, update, total_steps=6)
        phases = MemoryPhases(policy, optimizer=optimizer, offload=moves)
        losses = []
        for _ in range(3):
            for phase in ("bank", "refit", "rollout", "score"):
                phases.enter(phase)
            compute_logprobs(policy, bench.batches())
            phases.enter("update")
            losses.append(bench.step(policy, optimizer).loss)
        phases.enter("checkpoint")
        results[moves] = (losses, hf_weights(policy))
        moved = phases.take_metrics().values()["memory/moved_gib"]
        assert (moved > 0) == moves, moved
    assert results[True][0] == results[False][0]
    assert_close(results[True][1], results[False][1], 0)


# -- checks on one layout ------------------------------------------------------------------------------------


def check_memory_phases_with_buckets(bench: Bench) -> None:
    """The same holds if weights are gathered bucket by bucket during the forward pass."""
    check_memory_phases(bench, bucket_size=3000)


def check_memory_phases_with_adapters(bench: Bench) -> None:
    """If frozen weights and adapters leave the card and come back, training is equal to the bit."""
    check_memory_phases(bench, lora=LoraConfig(rank=4))


def check_data_parallel_updates(bench: Bench) -> None:
    """Three updates of a sharded optimizer give the same weights and norms as one replica with all data."""
    outcomes = {}
    for replicas in (1, 4):
        policy, update = bench.policy(distributed_optimizer=True, clip_grad=0.05)
        optimizer, _ = build_optimizer(policy, update, total_steps=10)
        batches = bench.batches(replicas=replicas)
        results = [bench.step(policy, optimizer, batches) for _ in range(3)]
        outcomes[replicas] = ([r.grad_norm for r in results], hf_weights(policy))
    expected_norm = math.sqrt(sum(float(g.norm()) ** 2 for g in bench.reference.gradients.values()))
    norms, weights = outcomes[4]
    assert math.isclose(norms[0], expected_norm, rel_tol=1e-5), (norms[0], expected_norm)
    assert norms[0] > 0.05, "gradients are not clipped: the check is blind to it"
    for found, expected in zip(norms, outcomes[1][0], strict=True):
        assert math.isclose(found, expected, rel_tol=1e-4), (norms, outcomes[1][0])
    assert_close(weights, outcomes[1][1], 1e-4)


Extrapolated = tuple[list[float], dict[str, float], dict[str, Tensor]]
"""The gradient norms of two extrapolated updates, their metrics, and the weights after them."""


def check_extrapolated_updates(bench: Bench) -> None:
    """The same holds for updates extrapolated from two probe steps, also if weights are gathered in buckets."""
    whole = extrapolated(bench, replicas=1)
    if bench.groups.rank == 0:
        torch.save(whole, bench.folder / "extrapolated.pt")
    for bucket_size in (None, 3000):
        same_updates(extrapolated(bench, replicas=4, bucket_size=bucket_size), whole)


def check_extrapolated_elsewhere(bench: Bench) -> None:
    """In this layout, extrapolated updates equal those of one replica in the first layout."""
    same_updates(extrapolated(bench), torch.load(bench.folder / "extrapolated.pt"))


def extrapolated(
    bench: Bench, *, replicas: int | None = None, bucket_size: int | None = None
) -> Extrapolated:
    policy, update = bench.policy(distributed_optimizer=True, clip_grad=0.05, bucket_size=bucket_size)
    optimizer, _ = build_optimizer(policy, update, total_steps=10)
    extrapolation = Extrapolation(ExtrapolationConfig(horizon=5))
    batches = bench.batches(replicas=replicas)
    losses = (bench.loss_function(batches), bench.loss_function(batches))
    bench.step(policy, optimizer, batches)
    results = [extrapolation.step(policy, optimizer, batches, losses) for _ in range(2)]
    assert all(result.update_ok for result in results)
    found = extrapolation.take_metrics(num_updates=2).reduce(bench.groups.dp_group)
    assert found["extrapolation/passes"] == 3 and 0 < found["extrapolation/inactive_share"] < 1
    return [r.grad_norm for r in results], found, hf_weights(policy)


def same_updates(found: Extrapolated, expected: Extrapolated) -> None:
    """Check that norms, metrics and weights differ by rounding only, with limits that allow for AdamW, which
    magnifies rounding errors."""
    for norm, other in zip(found[0], expected[0], strict=True):
        assert math.isclose(norm, other, rel_tol=1e-3), (found[0], expected[0])
    for name in ("factor_mean", "capped_share", "inactive_share", "multiplier", "ratio_mean"):
        one, other = found[1][f"extrapolation/{name}"], expected[1][f"extrapolation/{name}"]
        assert math.isclose(one, other, rel_tol=1e-2, abs_tol=1e-2), (name, one, other)
    assert_close(found[2], expected[2], 1e-3)


def check_clip_cov(bench: Bench) -> None:
    """Clip-Cov chooses the same tokens as one process, also if a replica has no token."""
    generator = torch.Generator().manual_seed(7)
    logprobs, advantages, draws = torch.rand(3, 300, generator=generator, dtype=torch.float64)
    values = (logprobs * -9, advantages * 3, draws)
    config = AlgorithmConfig(clip_cov_share=0.1)
    whole = clip_covariance(*values, config=config, dp_group=None)
    assert 10 < whole.sum() < 60, whole.sum()
    own = torch.arange(300) % (bench.groups.dp_size - 1) == bench.groups.dp_rank
    found = clip_covariance(*(v[own] for v in values), config=config, dp_group=bench.groups.dp_group)
    assert torch.equal(found, whole[own])


def check_one_best(bench: Bench) -> None:
    """All ranks use the best checkpoint that rank 0 sees, even if the other ranks see other files."""
    policy, update = bench.policy(distributed_optimizer=True)
    optimizer, schedule = build_optimizer(policy, update, total_steps=6)
    parts: dict[str, Any] = dict(
        policy=policy,
        optimizer=optimizer,
        schedule=schedule,
        entropy_weight=EntropyWeight(AlgorithmConfig()),
        extrapolation_gate=ExtrapolationGate(ExtrapolationConfig()),
        phases=MemoryPhases(policy, optimizer=optimizer),
        state=RolloutState(sampler=PromptSampler(10, 2, seed=0)),
        guards=Guards(GuardConfig(), clip_low=0.1, clip_high=0.1),
        train_prompts=SimpleNamespace(fingerprint="q"),
        test_sets=SimpleNamespace(fingerprint="t"),
    )
    engine_group = EngineGroup(index=bench.groups.rank, count=bench.groups.world_size)

    def open_run(root: Path) -> tuple[RunFolder, RunCheckpoints]:
        config = RunConfig(
            run=RunSettings(name="r", root=str(root)),
            model=ModelConfig(path="unused"),
            data=DataConfig(train="unused", test="unused"),
            search=SearchConfig(corpus="unused"),
        )
        folder = RunFolder(config, bench.groups)
        return folder, RunCheckpoints(folder, config, bench.groups, engine_group, **parts)

    seen_by_0, seen_by_others = bench.folder / "seen_by_0", bench.folder / "seen_by_others"
    folder, checkpoints = open_run(seen_by_0)
    folder.open("auto")
    checkpoints.best.offer(1, {"em": 0.5, "standard_error_em": 0.0})
    checkpoints.save(1)
    checkpoints.save(2)
    checkpoints.finish_saving()
    if bench.groups.rank == 0:
        hidden = seen_by_others / "r" / "checkpoints"
        hidden.mkdir(parents=True)
        (hidden / "step_2").symlink_to(folder.path / "checkpoints" / "step_2")
    dist.barrier()
    found = []
    for first, others in ((seen_by_0, seen_by_others), (seen_by_others, seen_by_0)):
        folder, checkpoints = open_run(first if bench.groups.rank == 0 else others)
        checkpoints.restore(folder.checkpoints / "step_2")
        found.append(checkpoints.best.step)
    assert found == [1, None], found


CHECKS: dict[str, list[Callable[[Bench], None]]] = {
    "dp4": [
        check_gradients,
        check_output_rows,
        check_entropy,
        check_scores,
        check_probes,
        check_correction,
        check_nan_is_skipped,
        check_resume,
        check_resume_with_buckets,
        check_resume_bfloat16,
        check_resume_whole_optimizer,
        check_memory_phases_with_buckets,
        check_data_parallel_updates,
        check_extrapolated_updates,
        check_retention,
        check_clip_cov,
        check_one_best,
        check_earlier_format,
        check_host_memory,
        check_fresh_adapters,
        check_adapters,
        check_adapter_update,
        check_resume_adapters,
        check_resume_adapters_with_buckets,
    ],
    "tp2": [check_gradients, check_output_rows, check_entropy, check_adapters, check_adapter_update],
    "tp2_sequence": [
        check_gradients,
        check_output_rows,
        check_scores,
        check_probes,
        check_extrapolated_elsewhere,
        check_fresh_adapters,
        check_adapters,
        check_adapter_update,
    ],
    "pp2_vpp2": [
        check_gradients,
        check_probes,
        check_turn_ratios,
        check_scores,
        check_update,
        check_nan_is_skipped,
        check_memory_phases,
        check_resume,
        check_another_layout,
        check_values_of_another_layout,
        check_adapters,
        check_memory_phases_with_adapters,
    ],
    "pp2": [check_gradients, check_output_rows, check_scores, check_nan_is_skipped, check_another_layout],
    "pp2_uneven": [check_gradients, check_scores, check_update],
    "cp2": [
        check_gradients,
        check_output_rows,
        check_turn_ratios,
        check_sequence_objectives,
        check_scores,
        check_correction,
        check_update,
        check_nan_is_skipped,
        check_resume,
    ],
    "tp2_cp2_sequence": [
        check_gradients,
        check_output_rows,
        check_turn_ratios,
        check_entropy,
        check_scores,
        check_update,
        check_another_layout,
        check_values_of_another_layout,
    ],
    "cp2_pp2_vpp2": [
        check_gradients,
        check_output_rows,
        check_turn_ratios,
        check_sequence_objectives,
        check_entropy,
        check_correction,
        check_update,
    ],
    "tp2_pp2": [
        check_gradients,
        check_turn_ratios,
        check_scores,
        check_correction,
        check_nan_is_skipped,
        check_resume,
        check_another_layout,
        check_values_of_another_layout,
        check_earlier_format_of_another_layout,
        check_adapters,
        check_resume_adapters,
        check_resume_adapters_elsewhere,
    ],
}


def run_checks(folder: Path, checks_by_layout: dict[str, Any], *, experts: int = 0) -> None:
    """Run all checks on the model in FOLDER/model, and write FOLDER/results.json."""
    trajectories, claims = make_trajectories(), Claims()
    rank = initialize(ParallelConfig(timeout_s=60), seed=3).rank
    if rank == 0:
        make_model(folder / "model", experts=experts)
    leave()
    reference = make_reference(folder / "model", trajectories)
    for layout, checks in checks_by_layout.items():
        bench = Bench(folder, layout, trajectories, reference)
        for check in checks:
            claims.check(f"{check.__name__.removeprefix('check_')}[{layout}]", check, bench)
        claims.save(folder / "results.json")
        del bench  # delete its groups too, because each has a thread that wakes a hundred times a second
        gc.collect()
        leave()


def leave() -> None:
    """End the process group. The next group uses a new port, because the old store keeps the keys of this group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert dist.group.WORLD is not None
    os.environ["MASTER_PORT"] = str(broadcast_object(port, dist.group.WORLD, source=0))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    shutdown()


if __name__ == "__main__":
    run_checks(Path(sys.argv[1]), CHECKS)
