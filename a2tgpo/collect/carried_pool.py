"""Groups that continue from step to step (`rollout.partial`): owners, selection for a step, files.

All decisions of this module use `Entry` records that are equal on all ranks, so all ranks decide the same. The groups
themselves stay on the engine that began them.
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
"""Name of the folder within a checkpoint; one file per engine."""


@dataclass(frozen=True, kw_only=True, order=True)
class Entry:
    """The facts about a group that all ranks know; sorts by age, then by prompt within a step."""

    begun: int
    """Version of the weights with which the group began (`Turn.version`)."""
    index: int
    """Index of the prompt among the prompts that began with it."""
    question: int
    engine: int
    """The engine that plays the group."""
    is_complete: bool = False

    @property
    def key(self) -> tuple[int, int]:
        """The key of its `CarriedGroup`."""
        return self.begun, self.index


@dataclass(frozen=True, kw_only=True)
class Carried:
    """The groups carried from one step to the next, as one rank holds them; immutable."""

    entries: tuple[Entry, ...] = ()
    """Groups of all engines, oldest first; equal on all ranks."""
    own: tuple[CarriedGroup, ...] = ()
    """This engine's groups."""


def engines_for(entries: Sequence[Entry], count: int, *, num_engines: int) -> list[int]:
    """Assign `count` new prompts to engines: each to the least loaded one, the lowest index first among equals."""
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
    """Return whether the step that plays `version` is the last one that may train on the group."""
    return version - entry.begun >= max_staleness


def with_complete(entries: Sequence[Entry], complete: Collection[tuple[int, int]]) -> list[Entry]:
    """Return `entries`, marked as complete if their key is in `complete`."""
    return [
        dataclasses.replace(entry, is_complete=entry.is_complete or entry.key in complete)
        for entry in entries
    ]


def to_finish(entries: Sequence[Entry], *, num_groups: int) -> list[Entry]:
    """Return the oldest unfinished groups that are needed to reach `num_groups` complete ones."""
    unfinished = sorted(entry for entry in entries if not entry.is_complete)
    return unfinished[: max(0, num_groups - (len(entries) - len(unfinished)))]


def select(entries: Sequence[Entry], *, num_groups: int) -> tuple[list[Entry], list[Entry]]:
    """Split into the `num_groups` oldest complete groups, which form the step, and the rest; both oldest first."""
    taken = sorted(entry for entry in entries if entry.is_complete)[:num_groups]
    keys = {entry.key for entry in taken}
    return taken, sorted(entry for entry in entries if entry.key not in keys)


def trajectories_of(groups: Sequence[CarriedGroup], taken: Sequence[Entry]) -> list[Trajectory]:
    """Return the trajectories of the `groups` in `taken`; their prompt_index becomes the group's place in `taken`."""
    places = {entry.key: place for place, entry in enumerate(taken)}
    return [
        dataclasses.replace(trajectory, prompt_index=places[group.key])
        for group in sorted(groups, key=lambda group: group.key)
        if group.key in places
        for trajectory in group.trajectories
    ]


def bounded(state: Carried, version: int, *, max_groups: int, max_staleness: int) -> Carried:
    """Return the oldest `max_groups` groups that are young enough to continue with `version`.

    Drops groups only if a run resumes with smaller settings than it was saved with.
    """
    young = [entry for entry in state.entries if version - entry.begun <= max_staleness]
    kept = {entry.key for entry in young[:max_groups]}
    return Carried(
        entries=tuple(entry for entry in state.entries if entry.key in kept),
        own=tuple(group for group in state.own if group.key in kept),
    )


def carried_file(engine: int) -> str:
    """Return the name of an engine's file within a checkpoint."""
    return f"{FOLDER}/engine_{engine}.bin"


def encode(state: Carried) -> bytes:
    """Serialise this engine's groups."""
    return encode_records(state.own)


@dataclass(frozen=True, kw_only=True)
class Held:
    """A group in a checkpoint, and the engine that will continue it."""

    engine: int
    group: CarriedGroup


def read(checkpoint: Path, *, num_engines: int) -> list[Held]:
    """Read a checkpoint's carried groups, oldest first; if the number of engines changed, deal them out in turn.

    Raises:
        ValueError: one line; a file does not hold carried groups.
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
    """Return the file's content; in replica_N.bin of release 0.1, the field `Turn.version` was called step."""
    content = path.read_bytes()
    if path.name.startswith("engine_"):
        return content
    groups = msgspec.msgpack.decode(content)
    for turn in (turn for group in groups for member in group["trajectories"] for turn in member["turns"]):
        turn["version"] = turn.pop("step")
    return msgspec.msgpack.encode(groups)


def carried(held: Sequence[Held], *, engine: int) -> Carried:
    """Return the `held` groups as the ranks of one engine hold them."""
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
