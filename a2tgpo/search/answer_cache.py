"""Answers of a search that are remembered, as many as fit into a given memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from sys import getsizeof

from a2tgpo.search.passage import Passage

Hits = Sequence[tuple[Passage, float]]
"""Passages with their scores, best first."""
ANSWER_BYTES, PASSAGE_BYTES = 300, 250
"""What Python takes for an answer and for each passage in it, besides their texts."""


class AnswerCache:
    """Forgets the least recently used answers first; safe to use from many threads.

    Args:
        max_bytes: of all answers together. Passages are counted in full, also those of a corpus that is in memory
            anyway; an answer that is larger by itself is not kept.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._answers: OrderedDict[tuple[str, int], Hits] = OrderedDict()
        self.num_bytes = 0
        """Taken at present."""
        self.num_hits = 0
        """Calls of `get` that found an answer."""

    def get(self, query: str, top_k: int) -> Hits | None:
        """What `put` was given; None if that is forgotten, or never was."""
        with self._lock:
            hits = self._answers.get((query, top_k))
            if hits is not None:
                self._answers.move_to_end((query, top_k))
                self.num_hits += 1
            return hits

    def put(self, query: str, top_k: int, hits: Hits) -> None:
        """Remember `hits`, which nobody changes from now on."""
        with self._lock:
            self._drop(query, top_k)
            size = _bytes_of(query, hits)
            if size > self._max_bytes:
                return
            self._answers[query, top_k] = hits
            self.num_bytes += size
            while self.num_bytes > self._max_bytes:
                self._drop(*next(iter(self._answers)))

    def clear(self) -> None:
        """Forget all answers."""
        with self._lock:
            self._answers.clear()
            self.num_bytes = 0

    def _drop(self, query: str, top_k: int) -> None:
        hits = self._answers.pop((query, top_k), None)
        if hits is not None:
            self.num_bytes -= _bytes_of(query, hits)


def _bytes_of(query: str, hits: Hits) -> int:
    texts = [text for passage, _ in hits for text in (passage.id, passage.title, passage.text)]
    return ANSWER_BYTES + PASSAGE_BYTES * len(hits) + getsizeof(query) + sum(map(getsizeof, texts))
