"""Search one corpus that is divided over several retrieval servers."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from a2tgpo.search.http_client import HttpSearch
from a2tgpo.search.passage import Passage


class ShardedIndex:
    """Searches all shards, each with its own client, and merges the answers by score.

    Dense scores are comparable across shards. A BM25 score depends on how rare a word is in its shard. A word is
    about equally rare in all interleaved parts of a corpus (tools/build_index.py --part), so the merged order is
    nearly that of one index for the whole corpus.
    """

    kind = "shards"

    def __init__(self, clients: Sequence[HttpSearch]):
        self._clients = clients
        self._executor = ThreadPoolExecutor(len(clients), thread_name_prefix="shard")

    def search_many(self, queries: Sequence[str], top_k: int) -> list[list[tuple[Passage, float]]]:
        """Return the best passages of all shards for each query.

        Raises:
            SearchError: if a shard gave no answer. An answer from only a part of the corpus would be wrong.
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
