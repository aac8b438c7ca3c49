"""Send a JSON request to a server, with a bound on its time and on the size of the answer, and with retries."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential_jitter,
)

MAX_WAIT_S = 8.0
"""Longest wait before a further try, seconds."""
RETRIED_STATUS = frozenset({408, 425, 429})
"""If the server answers with one of these statuses, or with 500 or above, the same request may succeed later."""


class PostError(RuntimeError):
    """A request got no answer. The message is one line with the cause.

    Args:
        status: the HTTP status with which the server refused the request; None if there was none.
        is_late: whether the answer took too long.
        is_too_large: whether the answer was too large.
        retry_after_s: seconds after which the server allows a further try; None if the server gave none.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        is_late: bool = False,
        is_too_large: bool = False,
        retry_after_s: float | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.is_late = is_late
        self.is_too_large = is_too_large
        self.retry_after_s = retry_after_s

    @property
    def is_transient(self) -> bool:
        """Whether the same request may succeed later."""
        if self.status is None:
            return not self.is_too_large
        return self.status >= 500 or self.status in RETRIED_STATUS


def new_client(
    *, timeout_s: float, max_connections: int, token: str | None, uses_proxy: bool = False
) -> httpx.Client:
    """Return a client that keeps its connections alive, and sends `token` with each request.

    Args:
        uses_proxy: whether to use the proxy that environment variables name. Servers in the cluster need no proxy.
    """
    return httpx.Client(
        trust_env=uses_proxy,
        timeout=timeout_s,
        # Request uncompressed answers, because one compressed chunk of zstd can expand to gigabytes.
        headers={"Accept-Encoding": "identity"}
        | ({} if token is None else {"Authorization": f"Bearer {token}"}),
        limits=httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections),
    )


def post_json(client: httpx.Client, url: str, payload: dict, *, timeout_s: float, max_bytes: int) -> bytes:
    """Return the body of the answer to a POST of `payload`. For the other arguments and the errors, see `fetch`."""
    return fetch(client, "POST", url, timeout_s=timeout_s, max_bytes=max_bytes, json=payload)


def fetch(
    client: httpx.Client, method: str, url: str, *, timeout_s: float, max_bytes: int, **content: Any
) -> bytes:
    """Return the body of the answer to a request.

    Args:
        content: arguments of `httpx.Client.stream`, such as `json` or `params`.
        timeout_s: longest time from sending the request to the last byte of the answer, seconds.
        max_bytes: largest size of the answer.

    Raises:
        PostError: if no answer with status 200 arrives within these limits.
    """
    deadline = time.monotonic() + timeout_s
    try:
        with client.stream(method, url, **content) as response:
            if response.status_code != 200:
                # Redirects are not followed, because they would turn the POST into a GET.
                raise _refusal(url, response)
            return _read(url, response, deadline, timeout_s=timeout_s, max_bytes=max_bytes)
    except httpx.TimeoutException:
        raise _late(url, timeout_s) from None
    except (
        httpx.HTTPError,
        httpx.InvalidURL,
        UnicodeError,
    ) as error:  # the host may be an invalid domain name
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PostError(f"{url} cannot be reached ({reason:.120})") from None


def retrying(
    kind: type[Exception],
    *,
    max_attempts: int,
    first_wait_s: float,
    before_retry: Callable[[RetryCallState], Any],
) -> Retrying:
    """Return an object that calls a function again if it raises `kind`, at most `max_attempts` times in all.

    The wait doubles before each further try. A random time of up to `first_wait_s` is added. No wait is longer than
    `MAX_WAIT_S`. If the exception has an attribute `retry_after_s`, the wait is at least that many seconds, but never
    above `MAX_WAIT_S`.
    """
    exponential = wait_exponential_jitter(initial=first_wait_s, max=MAX_WAIT_S, jitter=first_wait_s)

    def wait(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked_s = getattr(error, "retry_after_s", None) or 0.0
        return max(exponential(state), min(asked_s, MAX_WAIT_S))

    return Retrying(
        stop=stop_after_attempt(max_attempts),
        wait=wait,
        retry=retry_if_exception_type(kind),
        before_sleep=before_retry,
        reraise=True,
    )


def _read(url: str, response: httpx.Response, deadline: float, *, timeout_s: float, max_bytes: int) -> bytes:
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) > max_bytes:
            raise PostError(
                f"{url} sent more than {max_bytes // 2**20} MiB for one request", is_too_large=True
            )
        # httpx limits each read but not the total time, so a server that sends single bytes would never time out.
        if time.monotonic() > deadline:
            raise _late(url, timeout_s)
    return bytes(body)


def _late(url: str, timeout_s: float) -> PostError:
    return PostError(f"{url} did not answer within {timeout_s:g} s", is_late=True)


def _refusal(url: str, response: httpx.Response) -> PostError:
    status = response.status_code
    asked = response.headers.get("Retry-After", "")
    return PostError(
        f"{url} answered HTTP {status} {response.reason_phrase:.60}",
        status=status,
        retry_after_s=float(asked) if asked.isascii() and asked.isdecimal() else None,
    )
