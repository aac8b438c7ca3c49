"""Check that all-reduce sums correctly, and that it is fast enough."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from gpu_checks.bench import Bench

if TYPE_CHECKING:
    import torch

MIN_BUS_GB_S = {"nccl": 20.0, "gloo": 0.02}
"""{backend: smallest accepted bus bandwidth of the largest message}.

One network port of 200 Gb/s reaches 20 GB/s. A bandwidth below the limit suggests that NCCL uses TCP.
"""
SIZES_MIB = {"nccl": (1, 16, 128, 1024), "gloo": (1, 16)}
SMALL_KIB = 16
"""Size of a small all-reduce, about that of the hidden states of a few sequences."""


def check_all_reduce(bench: Bench) -> None:
    """Measure the bus bandwidth of all-reduce for several sizes, and check the bandwidth of the largest size.

    As in nccl-tests, the bus bandwidth over n ranks is 2 (n - 1) / n times the bytes, divided by the time.
    """
    import torch
    import torch.distributed as dist

    if bench.world_size == 1:
        return bench.skip("all-reduce", "one rank only; start more, or see several GPUs")
    on_gpu = torch.cuda.is_available()
    backend = "nccl" if on_gpu else "gloo"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(minutes=10))
    repeats = 20 if on_gpu else 4
    seconds = _all_reduce(SMALL_KIB * 2**10, bench, device, repeats=repeats)
    bench.info(f"all-reduce {SMALL_KIB} KiB", 1e6 * seconds, "us", backend, "all_reduce_us")
    # A plan can use the measured bandwidth only if all ranks are on one node.
    one_node = bench.world_size <= (torch.cuda.device_count() if on_gpu else bench.world_size)
    for size in SIZES_MIB[backend]:
        seconds = _all_reduce(size * 2**20, bench, device, repeats=repeats)
        bandwidth = 2 * (bench.world_size - 1) / bench.world_size * size * 2**20 / seconds / 1e9
        name, note = f"all-reduce {size} MiB", f"{backend}, {bench.world_size} ranks, {seconds * 1e3:.3g} ms"
        if size != SIZES_MIB[backend][-1]:  # mostly latency
            bench.info(name, bandwidth, "GB/s", note)
            continue
        given = bench.settings.min_bus_gb_s
        limit = MIN_BUS_GB_S[backend] if given is None else given
        bench.at_least(name, bandwidth, limit, "GB/s", note, "node_bus_gb_s" if one_node else "")
    dist.destroy_process_group()
    return None


def _all_reduce(num_bytes: int, bench: Bench, device: torch.device, *, repeats: int) -> float:
    """Run all-reduces of `num_bytes` bytes, and return the seconds of one all-reduce on the slowest rank.

    Raises:
        RuntimeError: if the sum is wrong.
    """
    import torch
    import torch.distributed as dist

    numbers = torch.full((num_bytes // 4,), float(bench.rank + 1), device=device)
    dist.all_reduce(numbers)  # connects the ranks, so that the timed calls need not do it
    error = (numbers - float(sum(range(1, bench.world_size + 1)))).abs().max().item()
    if error:
        raise RuntimeError(f"all-reduce of {num_bytes} bytes is wrong by {error}")
    wait = torch.cuda.synchronize if numbers.is_cuda else (lambda: None)
    dist.barrier()
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(numbers)
    wait()
    slowest = torch.tensor([(time.perf_counter() - start) / repeats], device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.item()
