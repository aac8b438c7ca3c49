"""Check that this machine's attention kernels give the same results for packed and for single sequences."""

from __future__ import annotations

from typing import Any

from gpu_checks import passes
from gpu_checks.bench import Bench
from gpu_checks.models import WIDE_HEADS, write_model
from gpu_checks.passes import MAX_GRADIENT_GAP, MAX_LOGPROB_GAP


def check_packed_attention(bench: Bench) -> None:
    """Compare log-probs and gradients of packed sequences with transformers on single sequences in float32."""
    import torch

    groups, dtype = passes.join(bench), passes.default_dtype()
    path = write_model(bench.work / "model")
    expected = passes.by_transformers(path, groups.device)
    found = passes.logprobs_and_gradients(path, groups, dtype=dtype)
    layers = "Transformer Engine" if torch.cuda.is_available() else "CPU twin"
    _compare(bench, "packed attention", found, expected, dtype, f"{layers}, {dtype}")
    branches = passes.logprobs_by_branches(path, groups, dtype=dtype)
    gap = (branches - expected[0][-len(branches) :]).abs().mean().item()
    bench.at_most("branches of one sequence, log-probs", gap, MAX_LOGPROB_GAP[dtype], "nats")

    by_default = passes.LONG_LENGTHS if torch.cuda.is_available() else passes.LENGTHS
    lengths = bench.settings.lengths or by_default
    path = write_model(bench.work / "wide", WIDE_HEADS, max_positions=max(1024, *(n + 1 for n in lengths)))
    expected = passes.by_transformers(path, groups.device, lengths)
    found = passes.logprobs_and_gradients(path, groups, dtype=dtype, lengths=lengths)
    shown = ",".join(map(str, lengths[:6])) + (",..." if len(lengths) > 6 else "")
    _compare(bench, "wide heads", found, expected, dtype, f"8 queries a key, 128 channels, lengths {shown}")


def check_context_parallel(bench: Bench) -> None:
    """Split sequences over two ranks. Compare log-probs and gradients with a computation on whole sequences."""
    if bench.world_size < 2 or bench.world_size % 2:
        return bench.skip("context parallel", f"{bench.world_size} ranks; needs an even number")
    from a2tgpo.config.parallel import ParallelConfig
    from a2tgpo.parallel.initialize import lay_out

    # Write the model before the ranks join. After that, transformers writes only on rank 0.
    path = write_model(bench.work / f"model-{bench.rank}")
    groups, dtype = passes.join(bench), passes.default_dtype()
    whole = passes.logprobs_and_gradients(path, groups, dtype=dtype)
    split = ParallelConfig(context=2)
    parts = passes.logprobs_and_gradients(path, lay_out(split, seed=0), dtype=dtype, parallel=split)
    _compare(bench, "context parallel", parts, whole, dtype, f"2 ranks, {dtype}")
    return None


def _compare(
    bench: Bench,
    what: str,
    found: tuple[Any, dict[str, Any]],
    expected: tuple[Any, dict[str, Any]],
    dtype: str,
    note: str,
) -> None:
    gap = (found[0] - expected[0]).abs().mean().item()
    bench.at_most(f"{what}, log-probs", gap, MAX_LOGPROB_GAP[dtype], "nats", note)
    bench.at_most(f"{what}, gradients", passes.distance(found[1], expected[1]), MAX_GRADIENT_GAP[dtype])
