"""Send each trajectory from the engine that played it to the data-parallel replica that trains on it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from a2tgpo.batch.balance import deal
from a2tgpo.parallel.collectives import all_gather_object, broadcast_bytes, send_bytes, world_group
from a2tgpo.parallel.groups import ParallelGroups
from a2tgpo.trajectory import Trajectory, decode_records, encode_records


def exchange(
    trajectories: Sequence[Trajectory], groups: ParallelGroups, *, prompts_per_minibatch: int
) -> list[Trajectory]:
    """Distribute trajectories so that all data-parallel replicas get similar numbers of tokens in each mini-batch.

    Every rank of the world must call this, even if it has no trajectory. Only ids and lengths are all-gathered. Each
    trajectory is sent once, to the first rank of its data-parallel replica. The first rank broadcasts the trajectory
    to the other ranks of the replica. The distribution does not depend on the engine that played a trajectory.

    Args:
        trajectories: on the first rank of an engine, the trajectories that this engine played. Empty on other ranks.
        prompts_per_minibatch: number k of prompts in a mini-batch. Mini-batch m has prompts m k to (m + 1) k - 1.

    Returns:
        The trajectories of this rank's data-parallel replica, sorted by (prompt_index, sample_index).
    """
    world = world_group()
    # The step does not train on a trajectory without a reward, so its length does not count.
    own = [
        (t.prompt_index, t.sample_index, t.num_tokens if t.reward_error is None else 0) for t in trajectories
    ]
    listed = sorted(item for part in all_gather_object(own, world) for item in part)
    assert len({item[:2] for item in listed}) == len(listed), "two engines played the same rollout"
    destination: dict[tuple[int, int], int] = {}
    for _, group in itertools.groupby(listed, key=lambda item: item[0] // prompts_per_minibatch):
        members = list(group)
        bins = deal([num_tokens for _, _, num_tokens in members], groups.dp_size)
        destination.update({item[:2]: dp for item, dp in zip(members, bins, strict=True)})

    outgoing: list[list[Trajectory]] = [[] for _ in range(groups.dp_size)]
    for trajectory in trajectories:
        outgoing[destination[trajectory.prompt_index, trajectory.sample_index]].append(trajectory)
    payloads = [encode_records(part) if part else b"" for part in outgoing]
    firsts = [groups.dp_ranks_of(index)[0] for index in range(groups.dp_size)]
    received = [
        trajectory
        for payload in _in_replica([part for part in send_bytes(payloads, firsts, world) if part], groups)
        for trajectory in decode_records(payload, list[Trajectory])
    ]
    return sorted(received, key=lambda t: (t.prompt_index, t.sample_index))


def _in_replica(payloads: list[bytes], groups: ParallelGroups) -> list[bytes]:
    """Return, on all ranks of the data-parallel replica, the `payloads` of its first rank."""
    if len(groups.dp_ranks_of(groups.dp_rank)) == 1:
        return payloads
    joined = encode_records(payloads)
    if groups.tp_rank == groups.cp_rank == 0:
        joined = broadcast_bytes(joined, groups.pp_group)
    if groups.tp_rank == 0:
        joined = broadcast_bytes(joined, groups.cp_group)
    joined = broadcast_bytes(joined, groups.tp_group)
    return decode_records(joined, list[bytes])
