"""One corpus over several retrieval servers: all are asked, the best of their answers count."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from a2tgpo.search.http_client import HttpSearch
from a2tgpo.search.passage import Passage


class ShardedIndex:
    """Merges the servers' answers by score.

    Dense scores of shards compare exactly. BM25's depend on how rare a word is in the shard: with parts that are
    dealt like cards (tools/build_index.py --part) they differ by little, and the order is nearly that of one index.

    Args:
        clients: one per shard.
    """

    kind = "shards"

    def __init__(self, clients: Sequence[HttpSearch]):
        self._clients = clients
        self._executor = ThreadPoolExecutor(len(clients), thread_name_prefix="shard")

    def search_many(self, queries: Sequence[str], top_k: int) -> list[list[tuple[Passage, float]]]:
        """The best of all shards for each query.

        Raises:
            SearchError: if a shard gives no answer: half a corpus would be a wrong answer.
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
