"""Read a web page from a public address, with bounds on its time, its size and its redirects."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from http.cookiejar import DefaultCookiePolicy
from urllib.parse import urljoin, urlsplit

import httpx

from a2tgpo.environment.tool import ToolError
from a2tgpo.environment.web.deadline import DeadlineTransport
from a2tgpo.environment.web.public_address import NotPublicError, allowed_address

MAX_REDIRECTS = 5
MAX_URL_CHARS = 2000
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_PORTS = {"http": 80, "https": 443}
_AGENT = "Mozilla/5.0 (compatible; a2tgpo)"


class PageError(ValueError):
    """The address leads to no page that can be read. The message is one line for the policy."""


@dataclass(frozen=True, kw_only=True)
class Page:
    url: str
    """The address after all redirects."""
    content_type: str
    """The media type, in lower case and without parameters."""
    charset: str | None
    """The charset that the server gave, or None."""
    body: bytes


class PageReader:
    """Reads pages. Threads may share it.

    Each connection goes to the IP address that was checked. Therefore proxies in environment variables are ignored.

    Args:
        timeout_s: seconds for the page and all redirects to it.
        max_bytes: number of bytes after which the rest of a page is left out.
        is_allowed: returns whether a connection to an IP address is allowed.
    """

    def __init__(
        self, *, timeout_s: float, max_bytes: int, is_allowed: Callable[[str], bool], max_connections: int
    ):
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes
        self._is_allowed = is_allowed
        self._client = httpx.Client(
            trust_env=False,
            timeout=timeout_s,
            headers={"User-Agent": _AGENT, "Accept": "text/html,text/plain", "Accept-Encoding": "gzip"},
            transport=DeadlineTransport(max_connections=max_connections),
        )
        # Refuse cookies, because a page must not depend on the pages that other trajectories have read.
        self._client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=()))

    def read(self, url: str) -> Page:
        """Return the page at `url`.

        Raises:
            PageError: the address is wrong or not public, or the server has no such page.
            ToolError: the server does not answer, or reports a fault of its own.
        """
        deadline = time.monotonic() + self._timeout_s
        for _ in range(MAX_REDIRECTS + 1):
            try:
                found = self._request(url, deadline)
            except httpx.TimeoutException:
                raise ToolError(f"the page did not arrive within {self._timeout_s:g} s") from None
            except httpx.HTTPError as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise ToolError(f"the server cannot be reached ({reason:.100})") from None
            if isinstance(found, Page):
                return found
            url = found
        raise PageError(f"the address redirects more than {MAX_REDIRECTS} times")

    def close(self) -> None:
        self._client.close()

    def _request(self, url: str, deadline: float) -> Page | str:
        """Return the page, or the address to which the server redirects."""
        request = self._build(url)
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise httpx.ReadTimeout("")
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), left_s)
        response = self._client.send(request, stream=True)
        try:
            if response.status_code in _REDIRECTS and "location" in response.headers:
                return _target(url, response.headers["location"])
            if response.status_code >= 500 or response.status_code == 429:
                raise ToolError(f"the server answered HTTP {response.status_code}")
            if response.status_code != 200:
                raise PageError(f"the server answered HTTP {response.status_code}")
            content_type = response.headers.get("content-type", "text/html").partition(";")[0].strip().lower()
            body = self._body(response, deadline)
            return Page(url=url, content_type=content_type, charset=response.charset_encoding, body=body)
        finally:
            response.close()

    def _build(self, url: str) -> httpx.Request:
        """Return a request that goes to a checked address of the host in `url`."""
        if len(url) > MAX_URL_CHARS:
            raise PageError(f"the address has more than {MAX_URL_CHARS} characters")
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port or _PORTS.get(parts.scheme, 0)
            target = httpx.URL(url)
        except (ValueError, httpx.InvalidURL):
            raise PageError("this is not an address; write http://... or https://...") from None
        if parts.scheme not in _PORTS or not host:
            raise PageError("this is not an address; write http://... or https://...")
        if parts.username is not None:
            raise PageError("the address contains a user name")
        try:
            address = allowed_address(target.host, port, self._is_allowed)
        except NotPublicError as error:
            raise PageError(str(error)) from None
        return self._client.build_request(
            "GET",
            target.copy_with(host=address, fragment=None),
            headers={"Host": target.netloc.decode("ascii")},
            extensions={"sni_hostname": target.raw_host.decode("ascii")},
        )

    def _body(self, response: httpx.Response, deadline: float) -> bytes:
        body = bytearray()
        for chunk in response.iter_raw():
            body += chunk
            if len(body) >= self._max_bytes:
                break
            if time.monotonic() > deadline:
                raise httpx.ReadTimeout("")
        encoding = response.headers.get("content-encoding", "identity").lower()
        if encoding in ("identity", ""):
            return bytes(body[: self._max_bytes])
        if encoding not in ("gzip", "deflate"):
            raise PageError(f"the page is encoded as {encoding:.20}")
        try:
            return zlib.decompressobj(wbits=47).decompress(bytes(body), self._max_bytes)
        except zlib.error:
            raise PageError("the page is damaged") from None


def _target(url: str, location: str) -> str:
    """Return the address to which the page at `url` redirects."""
    try:
        return urljoin(url, location)
    except ValueError:
        raise PageError("the page redirects to something that is not an address") from None
