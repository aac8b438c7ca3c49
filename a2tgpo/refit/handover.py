"""The trained weights into the running engine."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from a2tgpo.model.weights import iterate_hf_weights
from a2tgpo.refit.export import NamedTensor, buckets

if TYPE_CHECKING:
    from a2tgpo.model.policy import Policy
    from a2tgpo.rollout.vllm_engine import VllmEngine

MIB = 2**20


@dataclass(kw_only=True)
class RefitReport:
    """What one refit did on this rank."""

    skipped: bool
    """The engine held these weights already."""
    num_tensors: int = 0
    num_bytes: int = 0
    num_buckets: int = 0
    largest_bucket_bytes: int = 0
    seconds: float = 0.0


def refit(policy: Policy, engine: VllmEngine, *, version: int, bucket_mib: int) -> RefitReport:
    """Give the engine the policy's weights; every rank calls this, with an idle engine whose weights are awake.

    Nothing is done where the engine holds `version` already. Each rank hands full tensors to its own engine,
    which keeps the part that it needs.

    Args:
        version: names the policy's weights, equal on all ranks: the number of updates since `policy.path`,
            which is version 0.
        bucket_mib: largest group of gathered weights alive at once, MiB.

    Raises:
        RuntimeError: if the export and the engine's weights differ in a name or a shape.
    """
    if engine.weight_version == version and not engine.needs_weights:
        return RefitReport(skipped=True)
    start = time.monotonic()
    report = RefitReport(skipped=False)
    exported = buckets(iterate_hf_weights(policy), bucket_bytes=bucket_mib * MIB)
    engine.load_weights(_flattened(exported, report), version=version)
    report.seconds = time.monotonic() - start
    return report


def _flattened(exported: Iterable[list[NamedTensor]], report: RefitReport) -> Iterator[NamedTensor]:
    """Tensor by tensor, each dropped here once the next is asked for; counted in `report`."""
    for bucket in exported:
        bucket_bytes = sum(tensor.numel() * tensor.element_size() for _, tensor in bucket)
        report.num_tensors += len(bucket)
        report.num_bytes += bucket_bytes
        report.num_buckets += 1
        report.largest_bucket_bytes = max(report.largest_bucket_bytes, bucket_bytes)
        bucket.reverse()
        while bucket:
            yield bucket.pop()
