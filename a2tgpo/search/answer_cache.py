"""A cache of search answers with a bounded size in memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from sys import getsizeof

from a2tgpo.search.passage import Passage

Hits = Sequence[tuple[Passage, float]]
"""Passages with their scores, best first."""
ANSWER_BYTES, PASSAGE_BYTES = 300, 250
"""Memory that Python needs for an answer and for a passage, in addition to their texts."""


class AnswerCache:
    """Stores answers up to a total size, and evicts the least recently used answers first. It is thread-safe.

    Args:
        max_bytes: largest total size of the stored answers. The size includes a passage once for each answer that
            contains the passage. An answer above `max_bytes` is not stored.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._answers: OrderedDict[tuple[str, int], Hits] = OrderedDict()
        self.num_bytes = 0
        """Size of the stored answers, bytes."""
        self.num_hits = 0
        """Number of calls of `get` that found an answer."""

    def get(self, query: str, top_k: int) -> Hits | None:
        with self._lock:
            hits = self._answers.get((query, top_k))
            if hits is not None:
                self._answers.move_to_end((query, top_k))
                self.num_hits += 1
            return hits

    def put(self, query: str, top_k: int, hits: Hits) -> None:
        """Store `hits`, which must not change afterwards."""
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
