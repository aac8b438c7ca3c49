"""Divide the prompts of a draw among the engines (`rollout.assignment`).

With `fixed`, each engine plays an equal share of the prompts. With `on_demand`, each engine begins with as many
prompts as fill its slots. The other prompts form a queue. An engine with a free slot takes the next prompt of the
queue, so an engine whose trajectories are short plays more prompts than the others. Both settings sample the same
tokens, up to the rounding of the engines, because seeds do not depend on the engine.

A counter in the store of the process group contains the number of prompts that engines have taken from the queue. To
take a prompt, an engine increments the counter. So busy engines need not answer.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator, Sequence

import torch.distributed as dist

from a2tgpo.config.rollout import RolloutConfig
from a2tgpo.data.template import PromptSet
from a2tgpo.lifecycle.side_store import side_store
from a2tgpo.parallel.collectives import broadcast_object, world_group
from a2tgpo.parallel.engine_group import EngineGroup
from a2tgpo.trajectory import Prompt

STORE_TIMEOUT_S = 60.0


def queue_store() -> dist.Store:
    """Return a store for the counters of an `Assignment`. Every rank must call this."""
    # A new name, because a process may create several assignments.
    name = broadcast_object(uuid.uuid4().hex, world_group(), source=0)
    return side_store(f"prompts_{name}", timeout_s=STORE_TIMEOUT_S)


class Assignment:
    """Decides which prompts this rank's engine plays. Every rank must make the same calls.

    Args:
        prompts: the training questions.
        store: the store of the counters, with the same counters on all ranks. None: all shares are fixed.
    """

    def __init__(
        self,
        config: RolloutConfig,
        prompts: PromptSet,
        engine_group: EngineGroup,
        *,
        store: dist.Store | None,
    ):
        self._prompts = prompts
        self._engine_group = engine_group
        self._store = store
        group_size = config.tree.initial or config.group_size
        self._num_first = engine_group.count * math.ceil(config.max_concurrent / group_size)
        """Number of prompts that fill the slots of all engines."""
        self._num_queues = 0

    def divide(self, questions: Sequence[int], drawn: Sequence[int]) -> tuple[list[Prompt], Iterator[Prompt]]:
        """Return the prompts with which this engine begins, and the prompts that it takes later.

        The iterator takes a prompt from the queue each time that it is advanced, and ends when the queue is empty.
        All ranks of the engine must advance it together.

        Args:
            questions: indices of the questions of the step.
            drawn: positions in `questions` of the prompts that the engines play together.
        """
        if self._store is None or len(drawn) <= self._num_first:
            return self._prompts.prompts(questions, self._engine_group.share(drawn)), iter(())
        # Begin with the questions that need the most hops, so that the last groups of the queue are short.
        hops = {place: self._prompts.questions[questions[place]].hops for place in drawn}
        order = sorted(drawn, key=lambda place: -hops[place])
        first, queued = order[: self._num_first], order[self._num_first :]
        self._num_queues += 1
        return (
            self._prompts.prompts(questions, self._engine_group.share(first)),
            self._taken(questions, queued, self._store, counter=f"queue_{self._num_queues}"),
        )

    def _taken(
        self, questions: Sequence[int], queued: Sequence[int], store: dist.Store, *, counter: str
    ) -> Iterator[Prompt]:
        group, place = self._engine_group.group, 0
        while True:
            if self._engine_group.is_leader:
                place = store.add(counter, 1) - 1
            if group is not None:
                place = broadcast_object(place, group, source=0)
            if place >= len(queued):
                return
            yield from self._prompts.prompts(questions, [queued[place]])
