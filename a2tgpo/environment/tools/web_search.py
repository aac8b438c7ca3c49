"""The web_search tool, which queries a web search service. The section `web` names the service."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

from a2tgpo.config.run import RunConfig
from a2tgpo.config.web import WebConfig
from a2tgpo.environment.web.cassette import Cassette
from a2tgpo.environment.web.search_service import SearchService
from a2tgpo.io.errors import ConfigError
from a2tgpo.net.token import read_token

NO_RESULT = "No result."
TOKEN_VARIABLE = "A2TGPO_WEB_TOKEN"


class WebSearch:
    """Answers a call with results. Each part of the answer has one result's number, title, address and text.

    Args:
        service: queries the web. None if only recorded answers are used.
    """

    description = "Searches the web, and returns titles, addresses and short texts of pages."
    parameters: Mapping[str, Any] = {
        "type": "object",
        "properties": {"query": {"type": "string", "description": "What to look for."}},
        "required": ["query"],
    }

    def __init__(self, config: WebConfig, *, service: SearchService | None, cassette: Cassette):
        self._top_k = config.top_k
        self._service = service
        self._cassette = cassette
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def call(self, text: str) -> list[str]:
        query = " ".join(text.split())
        request = {"tool": "web_search", "query": query.casefold(), "top_k": self._top_k}
        recorded = self._cassette.find(request)
        source = "requests" if self._service is not None else "cassette_misses"
        with self._lock:
            self._counts["recorded" if recorded is not None else source] += 1
        if recorded is not None:
            return recorded
        if self._service is None:
            return [NO_RESULT]
        results = self._service.search(query)
        parts = [f"{rank}. {hit.title} ({hit.url})\n{hit.text}" for rank, hit in enumerate(results, start=1)]
        self._cassette.record(request, parts or [NO_RESULT])
        return parts or [NO_RESULT]

    def take_counts(self) -> dict[str, int]:
        """Return the numbers of requests, recorded answers, cassette misses and retries since the last call."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        if self._service is not None:
            retries, self._service.num_retries = self._service.num_retries, 0
            counts["retries"] = retries
        return dict(counts)

    def close(self) -> None:
        if self._service is not None:
            self._service.close()


def build(config: RunConfig) -> WebSearch:
    """Build the tool.

    Raises:
        ConfigError: with a one-line message, if `web.backend=serper` needs a key, but none is given.
    """
    web, service = config.web, None
    if web.backend != "recorded":
        token = None
        if web.backend == "serper":
            token = read_token(web.token_file, key="web.token_file", variable=TOKEN_VARIABLE)
            if token is None and not web.url:
                raise ConfigError(
                    "the tool web_search needs a key with web.backend=serper: web.token_file, or "
                    f"{TOKEN_VARIABLE} in the environment"
                )
        service = SearchService(web, token=token, max_connections=config.tools.max_concurrent_calls)
    return WebSearch(web, service=service, cassette=Cassette(web.cassette))
