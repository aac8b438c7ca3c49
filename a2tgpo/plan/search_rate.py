"""Predict how many searches per second a step demands, and how many a dense index can answer."""

from __future__ import annotations

from dataclasses import dataclass

from a2tgpo.plan.inputs import PlanInputs

CORE_FLOPS = 40e9
"""float32 operations per second of one CPU core in the products of a Flat search (docs/retrieval.md)."""
ENCODER_FLOPS = 2 * 85e6 * 16
"""Operations that an encoder of e5-base-v2's shape needs for one query of 16 tokens."""


@dataclass(frozen=True, kw_only=True)
class SearchDemand:
    """The searches of a step, assuming that every tool call is a search."""

    queries: float
    per_second: float
    """Searches per second if the rollout takes the planned time."""
    at_once: int
    """Largest number of concurrent searches, over all engines together."""


def search_demand(given: PlanInputs, rollout_s: float) -> SearchDemand:
    """Return the demand for searches in a planned step whose rollout takes `rollout_s` seconds."""
    trajectories = given.geometry.trajectories
    queries = trajectories * given.geometry.played_share * given.workload.turns
    return SearchDemand(
        queries=queries,
        per_second=queries / rollout_s,
        at_once=min(trajectories, given.geometry.engines * given.config.tools.max_concurrent_calls),
    )


def flat_queries_per_s(*, passages: int, dim: int, cores: int) -> float:
    """Return the queries per second of a server that compares each query with every passage, in full batches."""
    return cores * CORE_FLOPS / (2.0 * passages * dim + ENCODER_FLOPS)
