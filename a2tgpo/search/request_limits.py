"""Refuse requests that lack the token, are too large or come too often. The body of a refused request is not read."""

import hmac
import json
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

MAX_CLIENTS = 4096
"""Number of client addresses whose request rate is tracked. The least recently seen address is dropped first."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class RequestLimits:
    """ASGI middleware that refuses requests.

    A request gets status 401 if it lacks the token, 429 if its client sends too many requests, and 413 if its body is
    too large or does not declare its length. GET /health is never refused, because launchers wait for it.

    Args:
        token: bearer token; None: no token is required.
        max_requests_per_s: number of requests per second that one client address may send. A burst may have as many.
            0: no limit.
    """

    def __init__(self, app: App, *, token: str | None, max_body_bytes: int, max_requests_per_s: float):
        self._app = app
        self._authorization = None if token is None else f"Bearer {token}".encode("ascii")
        self._max_body_bytes = max_body_bytes
        self._rate = max_requests_per_s
        self._buckets: OrderedDict[str, tuple[float, float]] = (
            OrderedDict()
        )  # address -> (requests left, time of the last request)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
            return
        status, detail = refusal
        body = json.dumps({"detail": detail}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [*headers, (b"connection", b"close")],
            }
        )
        await send({"type": "http.response.body", "body": body})

    def _refusal(self, scope: Message) -> tuple[int, str] | None:
        headers = dict(scope["headers"])
        if scope["method"] == "GET" and scope["path"] == "/health":
            return None
        if self._authorization is not None and not hmac.compare_digest(
            headers.get(b"authorization", b""), self._authorization
        ):
            return 401, "a bearer token is required"
        if self._rate and not self._has_room(scope["client"][0] if scope.get("client") else ""):
            return 429, f"more than {self._rate:g} requests per second"
        length = headers.get(b"content-length", b"")
        # Without a declared length (chunked transfer), the body would take unbounded memory.
        if scope["method"] == "POST" and not (length.isdigit() and int(length[:20]) <= self._max_body_bytes):
            return 413, f"Content-Length must be given and at most {self._max_body_bytes} bytes"
        return None

    def _has_room(self, address: str) -> bool:
        now = time.monotonic()
        left, before = self._buckets.pop(address, (self._rate, now))
        left = min(self._rate, left + (now - before) * self._rate)
        has_room = left >= 1
        self._buckets[address] = (left - has_room, now)
        if len(self._buckets) > MAX_CLIENTS:
            self._buckets.popitem(last=False)
        return has_room
