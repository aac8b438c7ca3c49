"""All-reduce: that it sums, and how fast."""

from __future__ import annotations

import os
import time
from datetime import timedelta

from tools.gpu_checks_run import Bench

MIN_BUS_GB_S = {"nccl": 20.0, "gloo": 0.02}
"""Bus bandwidth of the largest message. 20 GB/s is what one 200 Gb/s network port gives: below it, NCCL has fallen
back to TCP. A DGX H100 is at several hundred inside a node."""
SIZES_MIB = {"nccl": (1, 16, 128, 1024), "gloo": (1, 16)}


def check_all_reduce(bench: Bench) -> None:
    """Bus bandwidth by size, as nccl-tests define it: 2 (n - 1) / n of the bytes, over the time of one all-reduce."""
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
    expected = float(sum(range(1, bench.world_size + 1)))
    sizes = SIZES_MIB[backend]
    for size in sizes:
        numbers = torch.full((size * 2**18,), float(bench.rank + 1), device=device)
        dist.all_reduce(numbers)  # also connects the ranks, which must not be timed
        error = (numbers - expected).abs().max().item()
        if error:
            raise RuntimeError(f"all-reduce of {size} MiB is wrong by {error}")
        seconds = _seconds(numbers, repeats=20 if on_gpu else 4)
        bandwidth = 2 * (bench.world_size - 1) / bench.world_size * size * 2**20 / seconds / 1e9
        is_last = size == sizes[-1]
        configured = MIN_BUS_GB_S[backend] if bench.min_bus_gb_s is None else bench.min_bus_gb_s
        note = f"{backend}, {bench.world_size} ranks, {seconds * 1e3:.3g} ms"
        # Small messages are bound by latency: they are shown, and held to nothing but being right.
        bench.at_least(f"all-reduce {size} MiB", bandwidth, configured if is_last else 0.0, "GB/s", note)
    dist.destroy_process_group()
    return None


def _seconds(numbers, *, repeats: int) -> float:
    import torch
    import torch.distributed as dist

    wait = torch.cuda.synchronize if numbers.is_cuda else (lambda: None)
    dist.barrier()
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(numbers)
    wait()
    slowest = torch.tensor([(time.perf_counter() - start) / repeats], device=numbers.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.item()
