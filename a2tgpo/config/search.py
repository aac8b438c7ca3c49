"""Settings of the search tool."""

from dataclasses import dataclass
from typing import Literal

from a2tgpo.config.expand import Expanded
from a2tgpo.io.errors import ConfigError, require
from a2tgpo.io.web_address import is_http_address


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """The search tool, which uses an index in the run's own processes or a retrieval server."""

    backend: Literal["bm25", "http"] = "bm25"
    """`bm25`: each process builds an index of `corpus`. `http`: queries go to a Search-R1 server at `url`."""
    corpus: Expanded = ""
    """JSONL file of passages, needed with `bm25`. A passage has `id` and `contents` ("title"\\ntext)."""
    url: Expanded = ""
    """Address of the retrieval server, needed with `http`, for example http://127.0.0.1:8000/retrieve."""
    url_file: Expanded = ""
    """File with the server's address, in place of `url`. `tools/retrieval_server.py --url-file` writes it. The client
    reads the file again if the server does not answer, so the server may move."""
    top_k: int = 3
    """Number of passages for a query (paper: 3)."""
    request_timeout_s: float = 30.0
    """Seconds that one request waits for the server."""
    max_attempts: int = 3
    """Number of attempts for a query. If all attempts fail, the server is considered down."""
    break_after: int = 16
    """Number of consecutive failures that open the circuit breaker. Further searches then fail at once."""
    break_s: float = 15.0
    """Seconds until an open circuit breaker lets one trial query pass. A failed trial keeps the breaker open for as
    long again."""
    token_file: Expanded = ""
    """File with the server's bearer token. Without a file, the client uses the environment variable
    A2TGPO_SEARCH_TOKEN, if it exists."""
    max_shortfall: float = 8.0
    """Before a run on GPUs, the server's speed in queries per second is measured. A warning is printed if the planned
    rollout needs more than this speed. The run is refused if the rollout needs more than max_shortfall times this
    speed; 0: never."""

    def __post_init__(self) -> None:
        for name in ("top_k", "max_attempts", "break_after"):
            require(getattr(self, name) >= 1, f"search.{name}", getattr(self, name), ">= 1")
        for name in ("request_timeout_s", "break_s"):
            require(getattr(self, name) > 0, f"search.{name}", getattr(self, name), "> 0")
        require(
            self.max_shortfall == 0 or self.max_shortfall >= 1,
            "search.max_shortfall",
            self.max_shortfall,
            "0, or >= 1",
        )
        # `require` is not used here, because its message would show the password.
        if "@" in "".join(self.url.split("/", 3)[2:3]):
            raise ConfigError(
                "search.url contains a user name or password; use search.token_file for a token"
            )

    @property
    def longest_call_s(self) -> float:
        """Upper limit, in seconds, of the duration of one search, including all attempts and waits."""
        return 2 * self.request_timeout_s * (self.max_attempts + 1)

    def require_source(self) -> None:
        """Raise `ConfigError` if the source that `backend` needs is not set. Call this only if the run has the search
        tool."""
        if self.backend == "bm25":
            require(bool(self.corpus), "search.corpus", self.corpus, "a file, with search.backend=bm25")
        else:
            require(
                not (self.url and self.url_file),
                "search.url",
                self.url,
                f"empty with search.url_file ({self.url_file}); set search.url_file= to use the address",
            )
            require(
                bool(self.url_file) or is_http_address(self.url),
                "search.url",
                self.url,
                "an http:// or https:// address, with search.backend=http and without search.url_file",
            )
