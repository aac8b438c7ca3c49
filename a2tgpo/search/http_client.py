"""Client of a Search-R1 compatible retrieval server.

The client sends {"queries": [text], "topk": k, "return_scores": true}. The answer is {"result": [[{"document": {"id",
"contents"}, "score": x}, ...]]}. A server that sends no scores may send {"id", "contents"} in place of each
{"document", "score"}.
"""

import functools
import json
import secrets
import threading
from collections.abc import Sequence

from tenacity import RetryCallState

from a2tgpo.net.circuit_breaker import CircuitBreaker
from a2tgpo.net.post import PostError, new_client, post_json, retrying
from a2tgpo.search.errors import SearchError, SearchUnavailableError
from a2tgpo.search.passage import Passage, parse_contents
from a2tgpo.search.server_address import ServerAddress

TOKEN_VARIABLE = "A2TGPO_SEARCH_TOKEN"
TOKEN_HINT = f"search.token_file, or {TOKEN_VARIABLE} in the environment"
MAX_RESPONSE_BYTES = 10 * 2**20
_STATUS_OF_THE_QUERY = frozenset({400, 413, 414, 422})
"""With these statuses, the server refuses one query, but may answer the next query."""


class _TransientError(SearchUnavailableError):
    """A failure that an immediate retry may cure."""


class HttpSearch:
    """Queries one server over kept-alive connections, with retries. The client is thread-safe.

    Args:
        address: address of the endpoint, for example http://127.0.0.1:8000/retrieve. A `ServerAddress` is read again
            after a failure.
        timeout_s: seconds from sending a request to the last byte of its answer.
        max_attempts: number of tries per query.
        break_after: after this many consecutive queries without an answer, only one query is sent every `break_s`
            seconds.
        first_wait_s: seconds before the second try. The wait doubles before each further try, up to 8 s. A random
            time of up to `first_wait_s` is added to each wait.
    """

    def __init__(
        self,
        address: str | ServerAddress,
        *,
        timeout_s: float,
        max_attempts: int,
        max_connections: int,
        break_after: int,
        break_s: float,
        token: str | None = None,
        first_wait_s: float = 0.25,
    ):
        self._address = ServerAddress(address) if isinstance(address, str) else address
        self.num_retries = 0
        self.num_refused = 0
        """Number of queries that were not sent because the circuit breaker was open."""
        self._new_breaker = functools.partial(CircuitBreaker, break_after=break_after, break_s=break_s)
        self._breaker = self._new_breaker()
        self._timeout_s = timeout_s
        self._max_attempts = max_attempts
        self._first_wait_s = first_wait_s
        self._lock = threading.Lock()
        self._client = new_client(timeout_s=timeout_s, max_connections=max_connections, token=token)

    def search(self, query: str, top_k: int) -> list[tuple[Passage, float]]:
        """Return at most `top_k` passages with their scores, best first. A score is 0.0 if the server sends none.

        Raises:
            SearchError: with a one-line message, if all tries failed, or if a retry cannot help.
            SearchUnavailableError: if the query is probably not the cause, or if the circuit breaker is open.
        """
        return self.search_many([query], top_k)[0]

    def search_many(self, queries: Sequence[str], top_k: int) -> list[list[tuple[Passage, float]]]:
        """Return the result of `search` for several queries, sent in one request. All queries succeed, or all
        fail."""
        if not self._breaker.allows() and not self._follow():
            with self._lock:
                self.num_refused += 1
            raise SearchUnavailableError(f"{self.url} has not answered for a while; not queried")
        attempts = retrying(
            _TransientError,
            max_attempts=self._max_attempts,
            first_wait_s=self._first_wait_s,
            before_retry=self._count_retry,
        )
        try:
            found = attempts(self._ask, queries, top_k)
        except _TransientError:
            self._breaker.failed()
            self._follow()
            raise
        except SearchError:
            self._breaker.succeeded()  # the server answered, though with an error
            raise
        self._breaker.succeeded()
        return found

    def answers_others(self) -> bool:
        try:
            self._ask([f"probe {secrets.token_hex(8)}"], 1)
        except SearchError:
            return False
        self._breaker.succeeded()
        return True

    def close(self) -> None:
        self._client.close()

    @property
    def url(self) -> str:
        """The server's last known address."""
        return self._address.url

    def _count_retry(self, _: RetryCallState) -> None:
        with self._lock:
            self.num_retries += 1
        self._follow()

    def _follow(self) -> bool:
        """Return whether the server has moved. If so, switch to its new address with a new circuit breaker."""
        with self._lock:
            if not self._address.has_moved():
                return False
            self._breaker = self._new_breaker()
            return True

    def _ask(self, queries: Sequence[str], top_k: int) -> list[list[tuple[Passage, float]]]:
        body = self._post({"queries": list(queries), "topk": top_k, "return_scores": True})
        try:
            return [hits[:top_k] for hits in _parse_answer(body, len(queries))]
        except (ValueError, OverflowError) as error:
            raise _TransientError(
                f"{self.url} sent an unusable answer: {error}", may_be_the_query=True
            ) from None

    def _post(self, payload: dict) -> bytes:
        try:
            return post_json(
                self._client, self.url, payload, timeout_s=self._timeout_s, max_bytes=MAX_RESPONSE_BYTES
            )
        except PostError as error:
            raise _search_error(error) from None


def _search_error(error: PostError) -> SearchError:
    hint = f"; give its token: {TOKEN_HINT}" if error.status == 401 else ""
    message = f"{error}{hint}"
    if error.is_too_large or error.status in _STATUS_OF_THE_QUERY:
        return SearchError(message)
    if error.is_transient:
        return _TransientError(message, may_be_the_query=error.is_late or error.status == 500)
    return SearchUnavailableError(message)


def _parse_answer(body: bytes, num_queries: int) -> list[list[tuple[Passage, float]]]:
    """Return the passages and scores of each query. Raise a short ValueError if the body is malformed."""
    try:
        answer = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except (json.JSONDecodeError, RecursionError):
        raise ValueError("not JSON") from None
    result = answer.get("result") if isinstance(answer, dict) else None
    if (
        not isinstance(result, list)
        or len(result) != num_queries
        or not all(isinstance(hits, list) for hits in result)
    ):
        wanted = "one list for the one query" if num_queries == 1 else f"{num_queries} lists"
        raise ValueError(f'expected {{"result": [[...]]}} with {wanted}')
    return [[_parse_hit(hit, position) for position, hit in enumerate(hits)] for hits in result]


def _parse_hit(hit: object, position: int) -> tuple[Passage, float]:
    document = hit.get("document", hit) if isinstance(hit, dict) else None
    if not isinstance(document, dict) or not isinstance(document.get("contents"), str):
        raise ValueError(f"passage {position} has no document.contents")
    score = hit.get("score", 0.0) if isinstance(hit, dict) else 0.0
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise ValueError(f"passage {position} has score {score!r:.40}")
    return parse_contents(str(document.get("id", position)), document["contents"]), float(score)
