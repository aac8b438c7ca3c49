"""Manage the groups that continue from step to step (`rollout.partial`).

All ranks have equal `Entry` records. Decisions depend on these records alone, so they are equal on all ranks. The
trajectories of a group stay on the engine that began the group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from a2tgpo.collect.informative import draw_size
from a2tgpo.rollout.carried_group import CarriedGroup
from a2tgpo.trajectory import Trajectory, decode_records, encode_records

FOLDER = "carried"
"""Name of a checkpoint's folder for carried groups. The folder has one file per engine."""


@dataclass(frozen=True, kw_only=True, order=True)
class Entry:
    """The facts about a group that all ranks know.

    Entries sort by age, with the oldest group first. Groups that began in the same step are in the order of their
    prompts.
    """

    begun: int
    """Version of the weights with which the group began (`Turn.version`)."""
    index: int
    """Index of the group's prompt among the new prompts of the step in which the group began."""
    question: int
    engine: int
    """Index of the engine that plays the group."""
    is_complete: bool = False
    is_dropped: bool = False
    """Whether dynamic sampling drops the group, because the group is complete but not informative."""

    @property
    def key(self) -> tuple[int, int]:
        """The key of the `CarriedGroup` that this entry describes."""
        return self.begun, self.index


@dataclass(frozen=True, kw_only=True)
class Carried:
    """What one rank knows about the groups that a step carries over to the next step. Immutable."""

    entries: tuple[Entry, ...] = ()
    """The entries of the groups of all engines, the oldest first. Equal on all ranks."""
    own: tuple[CarriedGroup, ...] = ()
    """The groups of this rank's engine, with their trajectories."""


def engines_for(entries: Sequence[Entry], count: int, *, num_engines: int) -> list[int]:
    """Return the engine index for each of `count` new prompts.

    Each prompt goes to the engine with the fewest unfinished groups. If several engines have equally few, the first
    of them gets the prompt.
    """
    load = [0] * num_engines
    for entry in entries:
        load[entry.engine] += not entry.is_complete
    chosen = []
    for _ in range(count):
        engine = load.index(min(load))
        load[engine] += 1
        chosen.append(engine)
    return chosen


def is_due(entry: Entry, version: int, *, max_staleness: int) -> bool:
    """Return whether the group of `entry` would be too stale for the step after the one with weights `version`."""
    return version - entry.begun >= max_staleness


def with_complete(
    entries: Sequence[Entry],
    complete: Collection[tuple[int, int]],
    *,
    dropped: Collection[tuple[int, int]] = (),
) -> list[Entry]:
    """Return `entries`, with marks on the entries whose keys are in `complete` and in `dropped`."""
    return [
        dataclasses.replace(
            entry,
            is_complete=entry.is_complete or entry.key in complete,
            is_dropped=entry.is_dropped or entry.key in dropped,
        )
        for entry in entries
    ]


def to_finish(entries: Sequence[Entry], *, num_groups: int) -> list[Entry]:
    """Return the oldest unfinished groups that must be finished to get `num_groups` complete groups.

    If groups were dropped, the number of groups to finish is an estimate (see `draw_size`).
    """
    unfinished = sorted(entry for entry in entries if not entry.is_complete)
    size = draw_size(kept_of(entries), num_groups=num_groups, num_engines=1, num_left=len(unfinished))
    return unfinished[:size]


def kept_of(entries: Sequence[Entry]) -> list[bool]:
    """Return, for each complete group, whether it was not dropped."""
    return [not entry.is_dropped for entry in entries if entry.is_complete]


def select(entries: Sequence[Entry], *, num_groups: int) -> tuple[list[Entry], list[Entry]]:
    """Return the `num_groups` oldest complete groups, and all other groups that were not dropped.

    If there are too few complete groups, the oldest dropped groups are returned, too. Both lists are sorted by age.
    """
    complete = sorted((entry.is_dropped, entry) for entry in entries if entry.is_complete)
    taken = sorted(entry for _, entry in complete[:num_groups])
    keys = {entry.key for entry in taken}
    return taken, sorted(entry for entry in entries if entry.key not in keys and not entry.is_dropped)


def trajectories_of(groups: Sequence[CarriedGroup], taken: Sequence[Entry]) -> list[Trajectory]:
    """Return the trajectories of those `groups` that have an entry in `taken`.

    The prompt_index of each returned trajectory is the position of its group in `taken`.
    """
    places = {entry.key: place for place, entry in enumerate(taken)}
    return [
        trajectory.renumbered(places[group.key])
        for group in sorted(groups, key=lambda group: group.key)
        if group.key in places
        for trajectory in group.trajectories
    ]


def bounded(state: Carried, version: int, *, max_groups: int, max_staleness: int) -> Carried:
    """Return `state` with only the `max_groups` oldest groups that are young enough to continue with `version`.

    Groups are dropped only if a run resumes with a smaller `max_groups` or `max_staleness`.
    """
    young = [entry for entry in state.entries if version - entry.begun <= max_staleness]
    kept = {entry.key for entry in young[:max_groups]}
    return Carried(
        entries=tuple(entry for entry in state.entries if entry.key in kept),
        own=tuple(group for group in state.own if group.key in kept),
    )


def carried_file(engine: int) -> str:
    """Return the path of an engine's file of carried groups within a checkpoint."""
    return f"{FOLDER}/engine_{engine}.bin"


def encode(state: Carried) -> bytes:
    """Return the bytes of the file that stores the carried groups of this rank's engine."""
    return encode_records(state.own)


@dataclass(frozen=True, kw_only=True)
class Held:
    """A carried group from a checkpoint, and the index of the engine that will continue this group."""

    engine: int
    group: CarriedGroup


def read(checkpoint: Path, *, num_engines: int) -> list[Held]:
    """Return the carried groups of a checkpoint, the oldest first.

    If the number of engines is the same as before, each group stays with its engine. Otherwise the engines receive
    the groups in turn.

    Raises:
        ValueError: with a one-line message, if a file does not contain carried groups.
    """
    files = sorted((checkpoint / FOLDER).glob("*_*.bin"), key=lambda path: int(path.stem.split("_")[1]))
    held: list[Held] = []
    for number, path in enumerate(files):
        try:
            groups = decode_records(_content(path), list[CarriedGroup])
        except (msgspec.DecodeError, RecursionError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} was not written by this program") from error
        held += [Held(engine=number, group=group) for group in groups]
    held.sort(key=lambda item: item.group.key)
    if len(files) == num_engines:
        return held
    return [Held(engine=place % num_engines, group=item.group) for place, item in enumerate(held)]


def _content(path: Path) -> bytes:
    """Return the content of a file of carried groups, in the present format.

    Release 0.1 wrote files named replica_N.bin. In these files, the field `Turn.version` has the name `step`.
    """
    content = path.read_bytes()
    if path.name.startswith("engine_"):
        return content
    groups = msgspec.msgpack.decode(content)
    for turn in (turn for group in groups for member in group["trajectories"] for turn in member["turns"]):
        turn["version"] = turn.pop("step")
    return msgspec.msgpack.encode(groups)


def carried(held: Sequence[Held], *, engine: int) -> Carried:
    """Return the `Carried` for the ranks of `engine`. It has all entries, but only this engine's groups."""
    entries = (
        Entry(
            begun=item.group.begun,
            index=item.group.prompt.index,
            question=item.group.question,
            engine=item.engine,
            is_complete=item.group.is_complete,
        )
        for item in held
    )
    return Carried(entries=tuple(entries), own=tuple(item.group for item in held if item.engine == engine))
