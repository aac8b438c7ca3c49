"""Searches per second: the demand of a step, and the capacity of a dense index."""

from __future__ import annotations

from dataclasses import dataclass

from a2tgpo.plan.inputs import PlanInputs

CORE_FLOPS = 40e9
"""Rate of one CPU core in the products of a Flat search, float32 operations per second: docs/retrieval.md."""
ENCODER_FLOPS = 2 * 85e6 * 16
"""Operations of one query of 16 tokens in an encoder of e5-base-v2's shape."""


@dataclass(frozen=True, kw_only=True)
class SearchDemand:
    """Tool calls of a step; all count as searches."""

    queries: float
    per_second: float
    """Searches per second over the planned rollout; a slower server makes the rollout longer."""
    at_once: int
    """Most concurrent searches, over all engines."""


def search_demand(given: PlanInputs, rollout_s: float) -> SearchDemand:
    """Return the searches of a planned step whose rollout takes `rollout_s` seconds."""
    trajectories = given.geometry.trajectories
    queries = trajectories * given.workload.turns
    return SearchDemand(
        queries=queries,
        per_second=queries / rollout_s,
        at_once=min(trajectories, given.geometry.engines * given.config.tools.max_concurrent_calls),
    )


def flat_queries_per_s(*, passages: int, dim: int, cores: int) -> float:
    """Return the queries per second of a server that compares each query with every passage, in full batches.

    2 * passages * dim operations per query, and those of the encoder.
    """
    return cores * CORE_FLOPS / (2.0 * passages * dim + ENCODER_FLOPS)
