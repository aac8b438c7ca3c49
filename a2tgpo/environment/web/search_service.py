"""Clients of web search services, with retries."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tenacity import RetryCallState

from a2tgpo.config.web import WebConfig
from a2tgpo.environment.tool import ToolError, ToolUnavailableError
from a2tgpo.net.post import PostError, fetch, new_client, retrying

SERPER_URL = "https://google.serper.dev/search"
MAX_ANSWER_BYTES = 5 * 2**20
_STATUS_OF_THE_QUERY = frozenset({400, 413, 414, 422})
_STATUS_OF_THE_KEY = frozenset({401, 402, 403})


@dataclass(frozen=True, kw_only=True)
class WebResult:
    title: str
    url: str
    text: str


class _TransientError(ToolUnavailableError):
    """A failure after which an immediate retry may succeed."""

    def __init__(self, message: str, *, retry_after_s: float | None = None):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class SearchService:
    """Queries one service. Threads may share it.

    Args:
        token: the key of the service, or None.
        first_wait_s: seconds before the second attempt. The wait doubles before each further attempt.
    """

    def __init__(
        self, config: WebConfig, *, token: str | None, max_connections: int, first_wait_s: float = 0.25
    ):
        self._config = config
        self._first_wait_s = first_wait_s
        self.url = config.url or SERPER_URL
        self._ask, self._parse = _BACKENDS[config.backend]
        self.num_retries = 0
        self._lock = threading.Lock()
        self._client = new_client(
            timeout_s=config.request_timeout_s, max_connections=max_connections, token=None, uses_proxy=True
        )
        if token is not None:
            self._client.headers["X-API-KEY"] = token

    def search(self, query: str) -> list[WebResult]:
        """Return the results for `query`, best first, at most `web.top_k`.

        Raises:
            ToolError: the service refuses this query.
            ToolUnavailableError: the service does not answer, or refuses all queries.
        """
        attempts = retrying(
            _TransientError,
            max_attempts=self._config.max_attempts,
            first_wait_s=self._first_wait_s,
            before_retry=self._count_retry,
        )
        found: list[WebResult] = attempts(self._search_once, query)
        return found[: self._config.top_k]

    def close(self) -> None:
        self._client.close()

    def _count_retry(self, _: RetryCallState) -> None:
        with self._lock:
            self.num_retries += 1

    def _search_once(self, query: str) -> list[WebResult]:
        method, url, content = self._ask(self.url, query, self._config.top_k)
        timeout_s = self._config.request_timeout_s
        try:
            body = fetch(
                self._client, method, url, timeout_s=timeout_s, max_bytes=MAX_ANSWER_BYTES, **content
            )
        except PostError as error:
            raise _failure(error) from None
        try:
            found = self._parse(json.loads(body))
            return [
                WebResult(title=_text(title), url=_text(url), text=_text(text)) for title, url, text in found
            ]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            problem = f"{type(error).__name__}: {error!s:.60}"
            raise _TransientError(f"{self.url} sent an unusable answer ({problem})") from None


def _failure(error: PostError) -> ToolError:
    if error.status in _STATUS_OF_THE_QUERY or error.is_too_large:
        return ToolError(str(error))
    if error.is_transient:
        return _TransientError(str(error), retry_after_s=error.retry_after_s)
    hint = "; check web.token_file" if error.status in _STATUS_OF_THE_KEY else ""
    return ToolUnavailableError(f"{error}{hint}")


def _ask_serper(url: str, query: str, top_k: int) -> tuple[str, str, dict[str, Any]]:
    return "POST", url, {"json": {"q": query, "num": top_k}}


def _ask_searxng(url: str, query: str, top_k: int) -> tuple[str, str, dict[str, Any]]:
    return "GET", f"{url.rstrip('/')}/search", {"params": {"q": query, "format": "json"}}


def _parse_serper(answer: Any) -> list[tuple[Any, Any, Any]]:
    return [(hit["title"], hit["link"], hit.get("snippet", "")) for hit in answer.get("organic", [])]


def _parse_searxng(answer: Any) -> list[tuple[Any, Any, Any]]:
    return [(hit["title"], hit["url"], hit.get("content") or "") for hit in answer["results"]]


_Ask = Callable[[str, str, int], tuple[str, str, dict[str, Any]]]
_Parse = Callable[[Any], list[tuple[Any, Any, Any]]]
_BACKENDS: dict[str, tuple[_Ask, _Parse]] = {
    "serper": (_ask_serper, _parse_serper),
    "searxng": (_ask_searxng, _parse_searxng),
}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is not a text")
    return " ".join(value.split())
