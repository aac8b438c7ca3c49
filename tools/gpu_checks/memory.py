"""Check that a copy of the training state to the host and back changes no bit, and measure the copies' speed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from gpu_checks import passes
from gpu_checks.bench import Bench
from gpu_checks.models import slice_dimensions, write_model
from gpu_checks.passes import LENGTHS

GIB = 2**30
MIN_SHARE_FREED = 0.9
"""Smallest share of the tensors' bytes that an offload must free on the GPU."""
UPDATES = 2


@dataclass(kw_only=True)
class Trained:
    """The results of a training with `UPDATES` updates."""

    tensors: list[Any]
    """The final weights, their float32 copies and the optimizer's moments, all on the CPU."""
    losses: list[float]
    held_gib: float = 0.0
    """Size in GiB of the tensors on the GPU before the last offload, or 0 without a GPU."""
    freed_gib: float = 0.0
    copied_gib: float = 0.0
    """Size in GiB of the last copy to the host, which is also the size of the copy back."""
    out_s: float = 0.0
    back_s: float = 0.0
    optimizer_s: float = 0.0
    """Seconds of the last optimizer step, including gradient norm and clipping."""
    optimizer_parameters: int = 0


def check_memory(bench: Bench) -> None:
    """Train twice without offloading and once with offloading after each update, and compare the results."""
    import torch

    from a2tgpo.parallel.determinism import compute_deterministically

    compute_deterministically(with_engine=False)
    on_gpu = torch.cuda.is_available()
    given = bench.settings
    dimensions = slice_dimensions(given.like, tensor=given.tensor, layers=given.layers, on_gpu=on_gpu)
    groups = passes.join(bench)
    path = write_model(bench.work / "slice", dimensions, device=groups.device)
    stays = _train(path, groups, offload=False)
    passes.release()
    again = _train(path, groups, offload=False)
    passes.release()
    losses = ", ".join(f"{loss:.6g}" for loss in stays.losses)
    same = f"of {len(stays.tensors)}; losses {losses}"
    bench.at_most("same updates twice, tensors that differ", _unequal(stays, again), 0, "", same)
    bench.at_most("update, change of the loss", stays.losses[-1] - stays.losses[0], 0.0, "nats")
    del again
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    moves = _train(path, groups, offload=True)
    bench.at_most(
        "all left and came back, tensors that differ",
        _unequal(stays, moves),
        0,
        "",
        f"of {len(stays.tensors)}",
    )
    _report_copies(bench, moves, on_gpu=on_gpu)


def _train(path: str, groups: Any, *, offload: bool) -> Trained:
    import torch

    from a2tgpo.config.model import ModelConfig
    from a2tgpo.config.parallel import ParallelConfig
    from a2tgpo.config.update import UpdateConfig
    from a2tgpo.memory.offload import optimizer_tensors, weight_tensors
    from a2tgpo.memory.phases import MemoryPhases
    from a2tgpo.model.build import build_policy
    from a2tgpo.update.optimizer import build_optimizer
    from a2tgpo.update.train_step import compute_gradients

    update = UpdateConfig(lr=1e-4, offload=offload)
    policy = build_policy(ModelConfig(path=path, dtype="bfloat16"), ParallelConfig(), groups, update=update)
    optimizer, _ = build_optimizer(policy, update, total_steps=UPDATES)
    phases = MemoryPhases(policy, optimizer=optimizer, offload=offload)
    batch = passes.packed(LENGTHS)
    sampled = batch.loss_mask[0].to(groups.device)
    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    done = Trained(tensors=[], losses=[])

    def loss(number: int, logprobs: Any, entropy: Any) -> tuple[Any, dict]:
        value = -logprobs[sampled].mean()
        done.losses.append(value.item())
        return value, {}

    for _ in range(UPDATES):
        phases.enter("update")
        compute_gradients(policy, [batch], loss)
        wait()
        start = time.perf_counter()
        optimizer.step()
        wait()
        done.optimizer_s = time.perf_counter() - start
        if offload:
            _move(phases, done)
    phases.enter("update")
    done.optimizer_parameters = sum(tensor.numel() for tensor in weight_tensors(policy))
    moved = [*weight_tensors(policy), *optimizer_tensors(policy, optimizer)]
    done.tensors = [tensor.detach().cpu().clone() for tensor in moved]
    return done


def _move(phases: Any, done: Trained) -> None:
    """Move the state off the GPU and back. Record the times of both copies."""
    import torch

    on_gpu = torch.cuda.is_available()
    phases.take_metrics()
    held = torch.cuda.memory_allocated() if on_gpu else 0
    start = time.perf_counter()
    phases.enter("rollout")
    done.out_s = time.perf_counter() - start
    left = torch.cuda.memory_allocated() if on_gpu else 0
    start = time.perf_counter()
    phases.enter("checkpoint")
    done.back_s = time.perf_counter() - start
    done.held_gib, done.freed_gib = held / GIB, (held - left) / GIB
    done.copied_gib = phases.take_metrics().values()["memory/moved_gib"] / 2


def _report_copies(bench: Bench, moves: Trained, *, on_gpu: bool) -> None:
    from a2tgpo.plan.train_time import OPTIMIZER_BYTES

    for what, seconds in (("leaves the card", moves.out_s), ("comes back", moves.back_s)):
        rate = moves.copied_gib * GIB / 1e9 / seconds
        note = f"{moves.copied_gib:.3g} GiB in {1e3 * seconds:.3g} ms"
        bench.info(f"training state {what}", rate, "GB/s", note)
    traffic = OPTIMIZER_BYTES * moves.optimizer_parameters / moves.optimizer_s / 1e9
    note = f"{moves.optimizer_parameters / 1e6:.4g} million parameters in {1e3 * moves.optimizer_s:.3g} ms"
    bench.info("optimizer step, memory traffic", traffic, "GB/s", note, "optimizer_gb_s")
    if not on_gpu:
        return bench.skip(
            "memory freed on the card", "needs a GPU: on a CPU card and host are the same memory"
        )
    import torch

    floor = MIN_SHARE_FREED * moves.held_gib
    bench.at_least("memory freed on the card", moves.freed_gib, floor, "GiB", f"of {moves.held_gib:.3g} GiB")
    stats = torch.cuda.memory_stats()
    reserved, allocated = (stats[f"{kind}_bytes.all.peak"] for kind in ("reserved", "allocated"))
    bench.info("reserved beyond what tensors hold", reserved / allocated - 1, "", "", "fragmentation_share")
    return None


def _unequal(first: Trained, second: Trained) -> int:
    import torch

    return sum(not torch.equal(a, b) for a, b in zip(first.tensors, second.tensors, strict=True))
