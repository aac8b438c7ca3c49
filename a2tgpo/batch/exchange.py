"""Trajectories go from the engine that played them to the data-parallel replica that trains on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from a2tgpo.batch.balance import deal
from a2tgpo.parallel.collectives import all_gather_object, exchange_bytes
from a2tgpo.parallel.groups import ParallelGroups
from a2tgpo.trajectory import Trajectory, decode_records, encode_records


def exchange(
    trajectories: Sequence[Trajectory], groups: ParallelGroups, *, prompts_per_minibatch: int
) -> list[Trajectory]:
    """Deal the step's trajectories to the data-parallel replicas, token-balanced inside each mini-batch.

    Every rank of the world must call this, also with none. Only lengths are known everywhere (a few bytes per
    trajectory, all-gathered); the trajectories themselves travel by one all-to-all, to the tensor x pipeline ranks
    of their replica and to nobody else. Who gets what depends on lengths and ids alone, not on who played it.

    Args:
        trajectories: those this rank's engine played; empty on ranks that only follow an engine.
        prompts_per_minibatch: prompts [m k, (m + 1) k) form mini-batch m.

    Returns:
        This replica's trajectories, equal on all its ranks, by (prompt_index, sample_index).
    """
    world = dist.group.WORLD
    assert world is not None, "torch.distributed is not initialised"
    own = [(t.prompt_index, t.sample_index, t.num_tokens) for t in trajectories]
    listed = sorted(item for part in all_gather_object(own, world) for item in part)
    assert len({item[:2] for item in listed}) == len(listed), "two engines played the same rollout"
    destination: dict[tuple[int, int], int] = {}
    for minibatch in sorted({prompt // prompts_per_minibatch for prompt, _, _ in listed}):
        members = [item for item in listed if item[0] // prompts_per_minibatch == minibatch]
        bins = deal([num_tokens for _, _, num_tokens in members], groups.dp_size)
        destination.update({item[:2]: dp for item, dp in zip(members, bins, strict=True)})

    outgoing: list[list[Trajectory]] = [[] for _ in range(groups.dp_size)]
    for trajectory in trajectories:
        outgoing[destination[trajectory.prompt_index, trajectory.sample_index]].append(trajectory)
    encoded = [encode_records(part) if part else b"" for part in outgoing]
    payloads = [encoded[groups.dp_index_of(rank)] for rank in range(groups.world_size)]
    received = [
        trajectory
        for payload in exchange_bytes(payloads, world)
        if payload
        for trajectory in decode_records(payload, list[Trajectory])
    ]
    return sorted(received, key=lambda t: (t.prompt_index, t.sample_index))
