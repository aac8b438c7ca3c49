"""Search one corpus that is divided over several retrieval servers."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from a2tgpo.search.http_client import HttpSearch
from a2tgpo.search.passage import Passage


class ShardedIndex:
    """Merges the servers' answers by score.

    Dense scores are comparable across shards. BM25 scores depend on how rare a word is within the shard; with
    interleaved parts (tools/build_index.py --part) this rarity differs little, and the order is nearly that of one
    index.

    Args:
        clients: one per shard.
    """

    kind = "shards"

    def __init__(self, clients: Sequence[HttpSearch]):
        self._clients = clients
        self._executor = ThreadPoolExecutor(len(clients), thread_name_prefix="shard")

    def search_many(self, queries: Sequence[str], top_k: int) -> list[list[tuple[Passage, float]]]:
        """Return the best passages of all shards for each query.

        Raises:
            SearchError: a shard gave no answer; half a corpus would give wrong answers.
        """
        pending = [self._executor.submit(client.search_many, queries, top_k) for client in self._clients]
        by_shard = [future.result() for future in pending]
        return [
            heapq.nlargest(top_k, (hit for answers in by_shard for hit in answers[i]), key=lambda hit: hit[1])
            for i in range(len(queries))
        ]

    def close(self) -> None:
        self._executor.shutdown()
        for client in self._clients:
            client.close()
