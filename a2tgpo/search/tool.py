"""The search tool of a rollout, with the same interface for all backends."""

from typing import Protocol

from a2tgpo.config.search import SearchConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.net.token import read_token
from a2tgpo.search.answer_cache import AnswerCache
from a2tgpo.search.bm25 import Bm25Index
from a2tgpo.search.corpus import load_corpus
from a2tgpo.search.errors import SearchError, SearchUnavailableError
from a2tgpo.search.http_client import TOKEN_VARIABLE, HttpSearch
from a2tgpo.search.passage import Passage
from a2tgpo.search.server_address import ServerAddress

__all__ = ["CachedSearch", "SearchError", "SearchTool", "build_search"]

CACHE_BYTES = 2**27
"""Size of the answer cache, enough for about 60,000 answers with three short passages each."""


class SearchTool(Protocol):
    """A search tool. Many threads may call it at the same time."""

    def search(self, query: str) -> list[Passage]:
        """Return the best passages for `query`, best first; the list may be empty.

        Raises:
            SearchError: if this query got no answer.
            SearchUnavailableError: if other queries would probably get no answer either.
        """

    def take_counts(self) -> dict[str, int]: ...

    def close(self) -> None: ...


class CachedSearch:
    """Searches with a backend, and caches its answers. Failures are not cached.

    If `tells_outages`, the tool sends another query after a failure, to find out whether the server answers at all.
    """

    def __init__(self, backend: Bm25Index | HttpSearch, *, top_k: int, tells_outages: bool = False):
        self._backend = backend
        self._top_k = top_k
        self._tells_outages = tells_outages
        self._cache = AnswerCache(CACHE_BYTES)
        self._taken: dict[str, int] = {}

    def search(self, query: str) -> list[Passage]:
        try:
            # A policy may write a lone surrogate, which cannot be sent.
            clean = " ".join(query.split()).encode("utf-8", "replace").decode("utf-8")
            hits = self._cache.get(clean, self._top_k)
            if hits is None:
                hits = self._backend.search(clean, self._top_k)
                self._cache.put(clean, self._top_k, hits)
            return [passage for passage, _ in hits]
        except SearchError as error:
            if self._answers_others(error):
                raise SearchError(f"{error}; it answers other queries") from None
            raise

    def _answers_others(self, error: SearchError) -> bool:
        """Return whether the server answers other queries, although `error` looks like an outage."""
        return (
            self._tells_outages
            and isinstance(error, SearchUnavailableError)
            and error.may_be_the_query
            and isinstance(self._backend, HttpSearch)
            and self._backend.answers_others()
        )

    def take_counts(self) -> dict[str, int]:
        """Return counts since the last call: cache hits and, with a retrieval server, retries and refused queries."""
        counts = {"cache_hits": self._cache.num_hits}
        if isinstance(self._backend, HttpSearch):
            counts |= {"retries": self._backend.num_retries, "refused": self._backend.num_refused}
        taken = {name: number - self._taken.get(name, 0) for name, number in counts.items()}
        self._taken = counts
        return taken

    def close(self) -> None:
        """Close the connections to the retrieval server, if there is one. The tool cannot be used afterwards."""
        if isinstance(self._backend, HttpSearch):
            self._backend.close()


def build_search(
    config: SearchConfig, *, max_connections: int = 16, tells_outages: bool = True, probe: bool = True
) -> CachedSearch:
    """Return the search tool that `config` describes; every rank builds its own tool.

    Args:
        max_connections: largest number of concurrent requests.
        tells_outages: as in `CachedSearch`; has an effect only with `search.backend=http`.
        probe: with `search.backend=http`, send one query first, so that a wrong address is found at the start.

    Raises:
        ConfigError: with a one-line message, if the corpus is malformed or the server does not answer the probe.
    """
    if config.backend == "bm25":
        return CachedSearch(Bm25Index(load_corpus(config.corpus)), top_k=config.top_k)
    client = HttpSearch(
        ServerAddress(config.url, config.url_file),
        timeout_s=config.request_timeout_s,
        max_attempts=config.max_attempts,
        max_connections=max_connections,
        break_after=config.break_after,
        break_s=config.break_s,
        token=read_token(config.token_file, key="search.token_file", variable=TOKEN_VARIABLE),
    )
    if probe:
        try:
            client.search("probe", config.top_k)
        except SearchError as error:
            client.close()
            key = "search.url_file" if config.url_file else "search.url"
            raise ConfigError(
                f"{key}: {error}; start the server (tools/retrieval_server.py) or correct the address"
            ) from None
    return CachedSearch(client, top_k=config.top_k, tells_outages=tells_outages)
