"""Settings of the tools that reach the web: web_search and visit."""

from dataclasses import dataclass
from typing import Literal

from a2tgpo.config.expand import Expanded
from a2tgpo.io.errors import require
from a2tgpo.io.web_address import is_http_address

LONGEST_WAIT_S = 8.0
"""Longest wait between two attempts of a request."""
LONGEST_EXTRACTION_S = 60
"""Longest time in seconds to extract the text of a page."""


@dataclass(frozen=True, kw_only=True)
class WebConfig:
    """The service that answers web_search, and the recorded answers of web_search and visit (docs/tools.md)."""

    backend: Literal["serper", "searxng", "recorded"] = "serper"
    """Source of the results. `serper`: Google's results from serper.dev, or a service that answers in the same way.
    `searxng`: a SearXNG server whose settings allow the format `json`. `recorded`: only the answers in `cassette`,
    for the tool `visit` too."""
    url: Expanded = ""
    """Address of the service. `serper`: the address of the endpoint; empty: https://google.serper.dev/search.
    `searxng`: the address of the server."""
    top_k: int = 5
    """Number of results that a query returns."""
    cassette: Expanded = ""
    """Folder in which answers of web_search and visit are recorded, one file each. A recorded answer is not requested
    again. Empty: nothing is recorded."""
    token_file: Expanded = ""
    """File with the API key of `serper`. Empty: the environment variable A2TGPO_WEB_TOKEN."""
    request_timeout_s: float = 20.0
    """Seconds that one request waits for its answer."""
    max_attempts: int = 3
    """Number of attempts for a query. If all attempts fail, the service is considered down (`tools.on_outage`)."""

    def __post_init__(self) -> None:
        for name in ("top_k", "max_attempts"):
            require(getattr(self, name) >= 1, f"web.{name}", getattr(self, name), ">= 1")
        require(self.request_timeout_s > 0, "web.request_timeout_s", self.request_timeout_s, "> 0")

    @property
    def longest_call_s(self) -> float:
        """Longest duration of one web_search, in seconds."""
        return (self.request_timeout_s + LONGEST_WAIT_S) * self.max_attempts

    def require_source(self) -> None:
        """Raise `ConfigError` if a setting that `backend` needs is not set; called only if a tool needs it."""
        if self.backend == "recorded":
            require(bool(self.cassette), "web.cassette", self.cassette, "a folder, with web.backend=recorded")
        elif self.url or self.backend == "searxng":
            is_address = is_http_address(self.url)
            rule = f"an http:// or https:// address, with web.backend={self.backend}"
            require(is_address, "web.url", self.url, rule)


@dataclass(frozen=True, kw_only=True)
class VisitConfig:
    """The tool `visit`, which reads a web page."""

    max_chars: int = 8000
    """Maximum number of characters of a page's text in an answer. `tools.max_part_tokens` also limits the answer."""
    max_bytes: int = 5_000_000
    """Maximum number of bytes of a page that are read. The rest of the page is ignored."""
    timeout_s: float = 20.0
    """Time limit in seconds for fetching the page and its redirects. The text is then extracted in at most 60 s."""
    allow_private: bool = False
    """Allow addresses that are not on the public internet, such as those of this cluster. The policy can then reach
    every server that this machine can reach."""

    def __post_init__(self) -> None:
        for name in ("max_chars", "max_bytes", "timeout_s"):
            require(getattr(self, name) > 0, f"visit.{name}", getattr(self, name), "> 0")

    @property
    def longest_call_s(self) -> float:
        """Longest duration of one visit, in seconds."""
        return self.timeout_s + LONGEST_EXTRACTION_S
