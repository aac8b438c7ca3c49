"""Client of a Search-R1 compatible retrieval server.

The client sends {"queries": [text], "topk": k, "return_scores": true}. The answer is {"result": [[{"document": {"id",
"contents"}, "score": x}, ...]]}. A server that sends no scores may send each document without this outer object.
"""

import functools
import json
import secrets
import threading
import time
from collections.abc import Sequence

import httpx
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential_jitter,
)

from a2tgpo.search.circuit_breaker import CircuitBreaker
from a2tgpo.search.errors import SearchError, SearchUnavailableError
from a2tgpo.search.passage import Passage, parse_contents
from a2tgpo.search.server_address import ServerAddress
from a2tgpo.search.token import TOKEN_VARIABLE

TOKEN_HINT = f"search.token_file, or {TOKEN_VARIABLE} in the environment"
MAX_RESPONSE_BYTES = 10 * 2**20
_RETRIED_STATUS = frozenset({408, 425, 429})
_STATUS_OF_THE_QUERY = frozenset({400, 413, 414, 422})
"""Statuses with which the server refuses one query, but may answer the next query."""


class _TransientError(SearchUnavailableError):
    """A failure that an immediate retry may cure."""


class HttpSearch:
    """Queries one server over kept-alive connections, with retries. Threads may share it.

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
        self._client = httpx.Client(
            # Retrieval servers are local, so ignore proxies from the environment.
            trust_env=False,
            timeout=timeout_s,
            # One compressed chunk of zstd can expand to gigabytes.
            headers={"Accept-Encoding": "identity"}
            | ({} if token is None else {"Authorization": f"Bearer {token}"}),
            limits=httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections),
        )

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
        retrying = Retrying(
            stop=stop_after_attempt(self._max_attempts),
            wait=wait_exponential_jitter(initial=self._first_wait_s, max=8, jitter=self._first_wait_s),
            retry=retry_if_exception_type(_TransientError),
            before_sleep=self._count_retry,
            reraise=True,
        )
        try:
            found = retrying(self._ask, queries, top_k)
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
        deadline = time.monotonic() + self._timeout_s
        try:
            with self._client.stream("POST", self.url, json=payload) as response:
                if response.status_code != 200:
                    # Redirects are not followed, because they would turn the POST into a GET.
                    raise self._refusal(response)
                return self._read(response, deadline)
        except httpx.TimeoutException:
            raise self._late() from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise _TransientError(f"{self.url} cannot be reached ({reason:.120})") from None

    def _read(self, response: httpx.Response, deadline: float) -> bytes:
        body = bytearray()
        for chunk in response.iter_raw():
            body += chunk
            if len(body) > MAX_RESPONSE_BYTES:
                raise SearchError(
                    f"{self.url} sent more than {MAX_RESPONSE_BYTES // 2**20} MiB for one request"
                )
            # httpx limits the time of each read. A server that sends single bytes would never exceed this limit.
            if time.monotonic() > deadline:
                raise self._late()
        return bytes(body)

    def _late(self) -> SearchError:
        return _TransientError(
            f"{self.url} did not answer within {self._timeout_s:g} s", may_be_the_query=True
        )

    def _refusal(self, response: httpx.Response) -> SearchError:
        status = response.status_code
        hint = f"; give its token: {TOKEN_HINT}" if status == 401 else ""
        message = f"{self.url} answered HTTP {status} {response.reason_phrase:.60}{hint}"
        if status in _STATUS_OF_THE_QUERY:
            return SearchError(message)
        if status >= 500 or status in _RETRIED_STATUS:
            return _TransientError(message, may_be_the_query=status == 500)
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
