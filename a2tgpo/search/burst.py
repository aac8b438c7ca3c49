"""Send a short burst of searches to check whether a retrieval server is fast enough for a run."""

from __future__ import annotations

import itertools
import math
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from a2tgpo.config.search import SearchConfig
from a2tgpo.net.token import read_token
from a2tgpo.search.errors import SearchError
from a2tgpo.search.http_client import TOKEN_VARIABLE, HttpSearch
from a2tgpo.search.server_address import ServerAddress

MAX_CLIENTS = 256
"""Largest number of clients. With more clients, this process would be the bottleneck."""


@dataclass(frozen=True, kw_only=True)
class Burst:
    """Result of a burst, in which each client sent a query as soon as its previous query was answered."""

    clients: int
    answered: int
    failed: int
    """Number of queries without an answer within `search.request_timeout_s`."""
    seconds: float
    """Time until the last query was answered or failed."""

    @property
    def per_second(self) -> float:
        return self.answered / self.seconds


def measure_burst(
    config: SearchConfig, queries: Sequence[str], *, clients: int, seconds: float = 3.0
) -> Burst:
    """Query the server of `config` for `seconds`, wait for the pending queries, and return the result.

    Args:
        queries: queries that resemble the queries of the run. A random suffix is added to each query, so that no
            cache has the answer.
        clients: number of concurrent queries, at most `MAX_CLIENTS`.
    """
    clients = min(clients, MAX_CLIENTS)
    client = HttpSearch(
        ServerAddress(config.url, config.url_file),
        timeout_s=config.request_timeout_s,
        max_attempts=1,
        max_connections=clients,
        break_after=2**31,
        break_s=1.0,
        token=read_token(config.token_file, key="search.token_file", variable=TOKEN_VARIABLE),
    )
    turns, lock = itertools.cycle(queries), threading.Lock()
    answered_at: list[float] = []
    failed: list[float] = []
    start = time.monotonic()

    def ask() -> None:
        while time.monotonic() < start + seconds:
            with lock:
                query = f"{next(turns)} {secrets.token_hex(3)}"
            try:
                client.search(query, config.top_k)
            except SearchError:
                failed.append(time.monotonic())
            else:
                answered_at.append(time.monotonic())

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client.close()
    return Burst(
        clients=clients,
        answered=len(answered_at),
        failed=len(failed),
        seconds=max([*answered_at, *failed, start + seconds]) - start,
    )


def judge_burst(burst: Burst, *, needed_per_s: float, max_shortfall: float) -> tuple[str, bool]:
    """Return a one-line warning ("" if the server is fast enough for the run), and whether the run must be refused.

    Args:
        needed_per_s: number of answers per second that the run needs.
        max_shortfall: largest allowed ratio of `needed_per_s` to the burst's answers per second; 0: no limit.
    """
    if burst.answered and burst.per_second >= needed_per_s:
        return "", False
    times = needed_per_s / burst.per_second if burst.answered else math.inf
    more = f", {times:.1f} times as many" if burst.answered else ""
    line = (
        f"the search server answers {burst.per_second:,.1f} queries/s of {burst.clients} clients at a time "
        f"({burst.failed} of {burst.failed + burst.answered} had no answer in time), the planned rollout needs "
        f"{needed_per_s:,.1f}/s{more}; give the server more cores or GPUs, divide its index over more servers, or "
        "use an IVF index (docs/retrieval.md)"
    )
    return line, 0 < max_shortfall < times
