"""Check that the schedulers on the ranks of an engine take the same decisions.

If two schedulers took different decisions, the collectives of a forward pass would hang, or would mix the activations
of different tokens. In every n-th pass (see `Lockstep`), the ranks compare a running hash of their decisions twice:
before the pass is computed, and before its tokens are used.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from a2tgpo.parallel.collectives import all_gather_object, all_reduce_max

_HASH_BYTES = 7  # the hash and its negative must fit into an int64
# To the id of a request, vLLM appends random characters that differ between the ranks
# (vllm/v1/engine/input_processor.py).
_SUFFIX_LENGTH = len("-01234567")
_UNITS = {"scheduled": " tokens", "took from the cache": " tokens", "sampled": ""}


class LockstepError(RuntimeError):
    """Raised on all ranks, with the same one-line message, if ranks of one engine took different decisions."""


@dataclass(frozen=True)
class Decision:
    """A decision of a scheduler about several requests, and the order of these requests."""

    number: int
    """Number of the engine's pass, counted from 1."""
    kind: str
    """"scheduled", "took from the cache", "sampled" or "freed"."""
    names: list[str]
    """Ids of the requests, in the scheduler's order."""
    values: list[Any]
    """For each request, its number of tokens or its sampled ids. Empty if the scheduler decided only the order."""

    def __str__(self) -> str:
        return f"{self.kind} {self.names} {self.values}"


class Lockstep:
    """Compare the decisions that vLLM's schedulers take on the ranks of one engine.

    All ranks of `group` must construct a `Lockstep` for their engine, and must step their engines in the same way.

    Args:
        scheduler: vLLM's scheduler on this rank. Three of its methods are wrapped.
        group: CPU group of the ranks that share the engine.
        every: the number n. The ranks compare their decisions in every n-th pass.
    """

    def __init__(self, scheduler: Any, group: dist.ProcessGroup, *, every: int):
        self._group = group
        self._every = every
        self._num_passes = 0
        self._hash = hashlib.blake2b(digest_size=_HASH_BYTES)
        self._decisions: list[Decision] = []
        """Decisions of this rank since the last comparison."""
        self._watch(scheduler)

    def compare(self) -> None:
        """Compare the ranks' decisions if a comparison is due. All ranks of the group must call this together.

        Raises:
            LockstepError: on all ranks of the group, if two ranks took different decisions.
        """
        if self._num_passes % self._every:
            return
        fingerprint = int.from_bytes(self._hash.digest(), "big")
        largest, smallest = all_reduce_max(torch.tensor([fingerprint, -fingerprint]), self._group).tolist()
        if largest != -smallest:
            parts = all_gather_object(self._decisions, self._group)
            ranks = dist.get_process_group_ranks(self._group)
            raise LockstepError(describe_difference(dict(zip(ranks, parts, strict=True))))
        self._decisions.clear()

    def _watch(self, scheduler: Any) -> None:
        schedule, update, free = (
            scheduler.schedule,
            scheduler.update_from_output,
            scheduler._free_request,
        )

        def watched_schedule(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self._num_passes += 1
            self._note("scheduled", output.num_scheduled_tokens, output.num_scheduled_tokens.values())
            if new := output.scheduled_new_reqs:
                found = (request.num_computed_tokens for request in new)
                self._note("took from the cache", (request.req_id for request in new), found)
            self.compare()
            return output

        def watched_update(scheduler_output: Any, model_output: Any) -> Any:
            if model_output.sampled_token_ids:
                self._note("sampled", model_output.req_ids, model_output.sampled_token_ids)
            return update(scheduler_output, model_output)

        def watched_free(request: Any, *args: Any, **kwargs: Any) -> Any:
            self._note("freed", [request.request_id])
            return free(request, *args, **kwargs)

        scheduler.schedule = watched_schedule
        scheduler.update_from_output = watched_update
        scheduler._free_request = watched_free

    def _note(self, kind: str, request_ids: Iterable[str], values: Iterable[Any] = ()) -> None:
        names = [request_id[:-_SUFFIX_LENGTH] for request_id in request_ids]
        decision = Decision(self._num_passes, kind, names, list(values))
        self._hash.update(str(decision).encode())
        self._decisions.append(decision)


def describe_difference(by_rank: dict[int, list[Decision]]) -> str:
    """Describe, in one line, the first decision on which two ranks differ."""
    first, *others = by_rank
    for other in others:
        pairs = zip(_numbered_texts(by_rank[first]), _numbered_texts(by_rank[other]), strict=False)
        difference = next((pair for pair in pairs if pair[0] != pair[1]), None)
        if difference is not None:
            (number, mine), (other_number, theirs) = difference
            return (
                f"the ranks of one engine are out of step at its pass {min(number, other_number)}: "
                f"rank {first} {mine}, rank {other} {theirs}; start again from the last checkpoint, with "
                "rollout.tensor_parallel=1 if it happens again, and report it"
            )
    counts = ", ".join(f"rank {rank} {len(decisions)}" for rank, decisions in by_rank.items())
    return f"the ranks of one engine are out of step: one took more decisions than another ({counts})"


def _numbered_texts(decisions: Iterable[Decision]) -> Iterable[tuple[int, str]]:
    """Yield (number of the pass, text of the decision) for each request of each decision."""
    for decision in decisions:
        for name, value in itertools.zip_longest(decision.names, decision.values):
            detail = "" if value is None else f" ({value}{_UNITS[decision.kind]})"
            yield decision.number, f"{decision.kind} {name}{detail}"
