"""The trained weights into the running engine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from a2tgpo.error_line import first_line
from a2tgpo.model.weights import iterate_hf_weights
from a2tgpo.parallel.collectives import all_gather_object

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
    seconds: float = 0.0


def refit(policy: Policy, engine: VllmEngine, *, version: int, bucket_mib: int) -> RefitReport:
    """Give the engine the policy's weights; every rank calls this, with an idle engine whose weights are awake.

    Nothing is done where the engine holds `version` already. Each rank hands full tensors to its own engine,
    which keeps the part that it needs; the next bucket is gathered while it does.

    Args:
        version: names the policy's weights, equal on all ranks: the number of updates since `policy.path`,
            which is version 0.
        bucket_mib: largest group of weights gathered at once, MiB; two are alive.

    Raises:
        RuntimeError: one line, on all ranks, if one rank's engine refused what it was given: its names and shapes
            are not the export's, for example. By itself on this rank, if the gathering failed.
    """
    if engine.weight_version == version and not engine.needs_weights:
        return RefitReport(skipped=True)
    start = time.monotonic()
    export = _Export(iterate_hf_weights(policy, bucket_bytes=bucket_mib * MIB))
    refusal, problem = None, None
    try:
        engine.load_weights(export, version=version)
    except Exception as error:
        if export.failed:  # nothing can be agreed on with ranks that wait in a gather
            raise
        refusal, problem = error, first_line(error)
    for _ in export:  # this rank's part in gathering, should its engine have stopped early
        pass
    world = dist.group.WORLD
    assert world is not None
    for rank, found in enumerate(all_gather_object(problem, world)):
        if found is not None:
            raise RuntimeError(f"{found} (rank {rank})") from refusal
    report = export.report
    report.seconds = time.monotonic() - start
    return report


class _Export(Iterator[tuple[str, torch.Tensor]]):
    """What goes to the engine, counted in `report`; each tensor is dropped here when it is given out."""

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
