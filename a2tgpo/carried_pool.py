"""Groups that go on from step to step (`rollout.partial`): who holds them, which a step takes, how they are saved.

What is decided here is decided from `Entry` records that are equal on all ranks, so all ranks decide the same. The
groups themselves stay with the replica that began them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from a2tgpo.rollout.carried_group import CarriedGroup
from a2tgpo.trajectory import Trajectory, decode_records, encode_records

FOLDER = "carried"
"""Within a checkpoint; a file per replica."""


@dataclass(frozen=True, kw_only=True, order=True)
class Entry:
    """A group as all ranks know it; ordered by age, and by prompt within a step."""

    begun: int
    """Step in which its prompt was asked, from 0."""
    index: int
    """Of its prompt among those of that step."""
    question: int
    replica: int
    """That plays it."""
    is_complete: bool = False

    @property
    def key(self) -> tuple[int, int]:
        """That of its `CarriedGroup`."""
        return self.begun, self.index


@dataclass(frozen=True, kw_only=True)
class Carried:
    """What is carried from one step to the next, as one rank holds it; never changed in place."""

    entries: tuple[Entry, ...] = ()
    """Of all replicas, oldest first; equal on all ranks."""
    own: tuple[CarriedGroup, ...] = ()
    """This replica's groups."""


@dataclass
class CarriedPool:
    """The run's; part of its state, as the sampler is."""

    state: Carried = Carried()


def replicas_for(entries: Sequence[Entry], count: int, *, num_replicas: int) -> list[int]:
    """The replica of each of `count` new prompts: whichever has fewest groups to play, in turn among equals."""
    load = [0] * num_replicas
    for entry in entries:
        load[entry.replica] += not entry.is_complete
    chosen = []
    for _ in range(count):
        replica = load.index(min(load))
        load[replica] += 1
        chosen.append(replica)
    return chosen


def is_due(entry: Entry, step: int, *, max_staleness: int) -> bool:
    """Whether `step` is the last that may train on it."""
    return step - entry.begun >= max_staleness


def with_complete(entries: Sequence[Entry], complete: Collection[tuple[int, int]]) -> list[Entry]:
    """`entries`, those whose key is in `complete` marked as complete."""
    return [
        dataclasses.replace(entry, is_complete=entry.is_complete or entry.key in complete)
        for entry in entries
    ]


def to_finish(entries: Sequence[Entry], *, num_groups: int) -> list[Entry]:
    """The oldest unfinished groups, as many as `num_groups` complete ones lack."""
    unfinished = sorted(entry for entry in entries if not entry.is_complete)
    return unfinished[: max(0, num_groups - (len(entries) - len(unfinished)))]


def select(entries: Sequence[Entry], *, num_groups: int) -> tuple[list[Entry], list[Entry]]:
    """The `num_groups` oldest complete groups, which make up the step, and all others; both oldest first."""
    taken = sorted(entry for entry in entries if entry.is_complete)[:num_groups]
    keys = {entry.key for entry in taken}
    return taken, sorted(entry for entry in entries if entry.key not in keys)


def trajectories_of(groups: Sequence[CarriedGroup], taken: Sequence[Entry]) -> list[Trajectory]:
    """Trajectories of those `groups` that are `taken`, prompt_index renumbered by their place there."""
    places = {entry.key: place for place, entry in enumerate(taken)}
    return [
        dataclasses.replace(trajectory, prompt_index=places[group.key])
        for group in sorted(groups, key=lambda group: group.key)
        if group.key in places
        for trajectory in group.trajectories
    ]


def bounded(state: Carried, step: int, *, max_groups: int, max_staleness: int) -> Carried:
    """What of `state` step `step` may go on with: the oldest `max_groups` groups that are not too old for it.

    All of it, unless a run goes on with smaller settings than it was saved with.
    """
    young = [entry for entry in state.entries if step - entry.begun <= max_staleness]
    kept = {entry.key for entry in young[:max_groups]}
    return Carried(
        entries=tuple(entry for entry in state.entries if entry.key in kept),
        own=tuple(group for group in state.own if group.key in kept),
    )


def carried_file(replica: int) -> str:
    """Name of a replica's file within a checkpoint."""
    return f"{FOLDER}/replica_{replica}.bin"


def encode(state: Carried) -> bytes:
    """This replica's groups for its file."""
    return encode_records(state.own)


@dataclass(frozen=True, kw_only=True)
class Held:
    """A group that a checkpoint carries over, and the replica that is to play it on."""

    replica: int
    group: CarriedGroup


def read(checkpoint: Path, *, num_replicas: int) -> list[Held]:
    """What a checkpoint carries, oldest first; of another number of replicas, dealt out to `num_replicas` in turn.

    Raises:
        ValueError: one line; a file does not hold such groups.
    """
    files = sorted((checkpoint / FOLDER).glob("replica_*.bin"), key=lambda path: int(path.stem.split("_")[1]))
    held: list[Held] = []
    for number, path in enumerate(files):
        try:
            groups = decode_records(path.read_bytes(), list[CarriedGroup])
        except (msgspec.DecodeError, RecursionError) as error:
            raise ValueError(f"{path} is not what this program writes") from error
        held += [Held(replica=number, group=group) for group in groups]
    held.sort(key=lambda item: item.group.key)
    if len(files) == num_replicas:
        return held
    return [Held(replica=place % num_replicas, group=item.group) for place, item in enumerate(held)]


def carried(held: Sequence[Held], *, replica: int) -> Carried:
    """What is `held`, as the ranks of one replica hold it."""
    entries = (
        Entry(
            begun=item.group.begun,
            index=item.group.prompt.index,
            question=item.group.question,
            replica=item.replica,
            is_complete=item.group.is_complete,
        )
        for item in held
    )
    return Carried(entries=tuple(entries), own=tuple(item.group for item in held if item.replica == replica))
