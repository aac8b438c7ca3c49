"""Search the queries of many requests in batches, and cache the answers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from a2tgpo.search.answer_cache import AnswerCache, Hits
from a2tgpo.search.index_folder import SearchIndex

CACHE_BYTES = 2**28
"""Default size of the answer cache."""


class QueryBatcher:
    """Searches an index with batches of queries. Equal queries in a batch are searched once. The class is
    thread-safe.

    Args:
        num_threads: number of batches that are searched at the same time. Use 1 for an index with an encoder, because
            one batch already uses all cores or the GPU.
        on_batch: called with the size of each batch.
    """

    def __init__(
        self,
        index: SearchIndex,
        *,
        num_threads: int,
        max_batch: int = 64,
        cache_bytes: int = CACHE_BYTES,
        on_batch: Callable[[int], None] = lambda size: None,
    ):
        self._index = index
        self._max_batch = max_batch
        self._on_batch = on_batch
        self._cache = AnswerCache(cache_bytes)
        self._waiting: queue.SimpleQueue[tuple[tuple[str, int], Future[Hits]] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"search-{number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_hits(self) -> int:
        return self._cache.num_hits

    def submit(self, query: str, top_k: int) -> Future[Hits]:
        """Queue a query, and return a future for its answer."""
        known = self._cache.get(query, top_k)
        future: Future[Hits] = Future()
        if known is not None:
            future.set_result(known)
        else:
            self._waiting.put(((query, top_k), future))
        return future

    def close(self) -> None:
        """Answer pending queries, then end the threads."""
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            by_top_k: dict[int, dict[str, list[Future[Hits]]]] = {}
            for (query, top_k), future in batch:
                by_top_k.setdefault(top_k, {}).setdefault(query, []).append(future)
            self._on_batch(len(batch))
            for top_k, futures in by_top_k.items():
                self._search(top_k, futures)

    def _next_batch(self) -> list[tuple[tuple[str, int], Future[Hits]]] | None:
        """Return the next batch, which has at least one query; None after `close`."""
        first = self._waiting.get()
        if first is None:
            return None
        batch = [first]
        while len(batch) < self._max_batch:
            try:
                item = self._waiting.get_nowait()
            except queue.Empty:
                break
            if item is None:  # a `None` ends one thread, but this thread has a batch to send
                self._waiting.put(None)
                break
            batch.append(item)
        return batch

    def _search(self, top_k: int, futures: dict[str, list[Future[Hits]]]) -> None:
        queries: Sequence[str] = list(futures)
        try:
            answers = self._index.search_many(queries, top_k)
        except BaseException as error:  # the waiting callers get the error and do not hang
            for waiting in futures.values():
                for future in waiting:
                    future.set_exception(error)
            return
        for query, hits in zip(queries, answers, strict=True):
            self._cache.put(query, top_k, hits)
            for future in futures[query]:
                future.set_result(hits)
