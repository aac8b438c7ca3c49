"""Describe in one line why a GPU ran out of memory."""

from __future__ import annotations

import re
from collections.abc import Mapping

GIB = 2**30
_TRAINING = "lower update.max_microbatch_tokens, set model.recompute=full, or raise parallel.tensor"
_STATE = "set update.offload=true or update.distributed_optimizer=true, or raise parallel.tensor"
_ENGINE = "lower rollout.gpu_memory_fraction or rollout.max_concurrent, or raise rollout.tensor_parallel"
_REMEDIES = {
    "start": _ENGINE,
    "refit": "lower rollout.gpu_memory_fraction or refit.bucket_mib, or raise parallel.tensor",
    "rollout": _ENGINE,
    "score": "lower update.max_microbatch_tokens, or raise parallel.tensor or parallel.context",
    "update": _TRAINING,
}
"""Memory phase -> the three settings that most likely help. For phases that are not listed, these are in `_STATE`."""


def shortage_line(
    message: str, *, phase: str, resident: Mapping[str, int | None], in_use: Mapping[str, int], total: int
) -> str:
    """Return one line that names the phase, what was on the GPU, and the settings that help.

    Args:
        message: the message of torch's error, which gives the size of the failed allocation.
        resident: the parts of the table in `residency` that are on the GPU. Maps each to its bytes, or to None if
            its size is unknown.
        in_use: bytes on the GPU, see `phases.memory_in_use`.
        total: bytes of the GPU's memory.
    """
    found = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", message)
    sizes = [name if size is None else f"{name} {size / GIB:.2f} GiB" for name, size in resident.items()]
    if "allocated" in in_use:
        others = in_use["allocated"] - sum(size or 0 for size in resident.values())
        sizes.append(f"other tensors {max(others, 0) / GIB:.2f} GiB")
        sizes.append(f"torch's cache {(in_use['reserved'] - in_use['allocated']) / GIB:.2f} GiB")
    return (
        f"GPU out of memory in memory phase {phase}: {found[1] if found else 'more'} requested, "
        f"{max(total - in_use['used'], 0) / GIB:.2f} of {total / GIB:.2f} GiB free; on the GPU: {', '.join(sizes)}; "
        f"{_REMEDIES.get(phase, _STATE)} (docs/troubleshooting.md)"
    )
