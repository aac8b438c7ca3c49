"""Searches a second: what a step asks of the retrieval server, and what a dense index can answer."""

from __future__ import annotations

from dataclasses import dataclass

from a2tgpo.plan.inputs import PlanInputs

CORE_FLOPS = 40e9
"""Of one CPU core in the products of a Flat search, float32 operations a second: docs/retrieval.md."""
ENCODER_FLOPS = 2 * 85e6 * 16
"""Of one query of 16 tokens in an encoder of e5-base-v2's shape."""


@dataclass(frozen=True, kw_only=True)
class SearchDemand:
    """Tool calls of a step, all taken for searches."""

    queries: float
    per_second: float
    """Over the planned rollout; a server that answers fewer makes the rollout longer."""
    at_once: int
    """Most that are under way at a time, over all engines."""


def search_demand(given: PlanInputs, rollout_s: float) -> SearchDemand:
    """What the step of a plan asks, in a rollout of `rollout_s` seconds."""
    trajectories = given.geometry.trajectories
    queries = trajectories * given.workload.turns
    return SearchDemand(
        queries=queries,
        per_second=queries / rollout_s,
        at_once=min(trajectories, given.geometry.engines * given.config.search.num_workers),
    )


def flat_queries_per_s(*, passages: int, dim: int, cores: int) -> float:
    """What a server answers that compares a query with every passage, in full batches.

    2 passages dim operations a query, and those of the encoder.
    """
    return cores * CORE_FLOPS / (2.0 * passages * dim + ENCODER_FLOPS)
