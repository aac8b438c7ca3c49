"""Refit: move the trained weights to the running engine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from a2tgpo.io.errors import first_line
from a2tgpo.model.weights import iterate_hf_weights
from a2tgpo.parallel.collectives import all_gather_object, world_group

if TYPE_CHECKING:
    from a2tgpo.model.policy import Policy
    from a2tgpo.rollout.vllm_engine import VllmEngine

MIB = 2**20


@dataclass(kw_only=True)
class RefitReport:
    """The result of one refit on this rank."""

    skipped: bool
    """Whether nothing was moved because the engine already held these weights."""
    num_tensors: int = 0
    num_bytes: int = 0
    seconds: float = 0.0


def refit(policy: Policy, engine: VllmEngine, *, version: int, bucket_mib: int) -> RefitReport:
    """Load the policy's weights into the engine. Every rank must call this.

    The engine must be idle, and its weights must be awake. If the engine already holds `version`, nothing is done.
    Each rank passes full tensors to its own engine, which keeps only its part of them.

    Args:
        version: the number of steps for which the weights were trained, equal on all ranks.
        bucket_mib: largest number of MiB of weights to gather at once. Two such buckets exist at the same time.

    Raises:
        RuntimeError: with a one-line message on all ranks, if an engine refused the weights. An error in gathering
            the weights is raised on this rank only.
    """
    if engine.weight_version == version and not engine.needs_weights:
        return RefitReport(skipped=True)
    start = time.monotonic()
    export = _Export(iterate_hf_weights(policy, bucket_bytes=bucket_mib * MIB))
    refusal, problem = None, None
    try:
        engine.load_weights(export, version=version)
    except Exception as error:
        if export.failed:  # the other ranks wait in a gather, so this rank cannot tell them about the error
            raise
        refusal, problem = error, first_line(error)
    # If this rank's engine stopped early, the other ranks still need this rank in the remaining gathers.
    for _ in export:
        pass
    for rank, found in enumerate(all_gather_object(problem, world_group())):
        if found is not None:
            raise RuntimeError(f"{found} (rank {rank})") from refusal
    report = export.report
    report.seconds = time.monotonic() - start
    return report


class _Export(Iterator[tuple[str, torch.Tensor]]):
    """Iterator over the weights for the engine. `report` counts the weights, and no reference to a tensor is kept."""

    def __init__(self, weights: Iterator[tuple[str, torch.Tensor]]):
        self._weights = weights
        self.report = RefitReport(skipped=False)
        self.failed = False

    def __next__(self) -> tuple[str, torch.Tensor]:
        try:
            name, tensor = next(self._weights)
        except StopIteration:
            raise
        except BaseException:
            self.failed = True
            raise
        self.report.num_tensors += 1
        self.report.num_bytes += tensor.numel() * tensor.element_size()
        return name, tensor
