"""Settings of the search tool: the source of its passages, and the limits of requests to a retrieval server."""

from dataclasses import dataclass
from typing import Literal

from a2tgpo.config.expand import Expanded
from a2tgpo.io.errors import ConfigError, require


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """The search tool's passages come from an index in the run's own processes, or from a retrieval server."""

    backend: Literal["bm25", "http"] = "bm25"
    """bm25: each process builds an index of `corpus`. http: a server at `url` that is compatible with Search-R1."""
    corpus: Expanded = ""
    """JSONL file of passages, needed with bm25. Each passage has `id` and `contents` ("title"\\ntext)."""
    url: Expanded = ""
    """Address of the retrieval server's endpoint, needed with http, for example http://127.0.0.1:8000/retrieve."""
    url_file: Expanded = ""
    """File that contains the server's address, in place of `url`; `tools/retrieval_server.py --url-file` writes it.
    The client reads the file again if the server does not answer, so that the server may move to another address."""
    top_k: int = 3
    """Number of passages that a query returns (paper: 3)."""
    request_timeout_s: float = 30.0
    """Seconds that one request waits for the server's answer."""
    max_attempts: int = 3
    """Number of times that a query is sent within a few seconds. If none is answered, the server counts as out of
    service."""
    break_after: int = 16
    """After this many consecutive failures the circuit breaker opens, and further searches fail at once."""
    break_s: float = 15.0
    """Seconds until an open circuit breaker lets one trial query pass. If the trial fails, the breaker stays open for
    this time again."""
    token_file: Expanded = ""
    """File that contains the bearer token which the server requires. If no file is set, the client uses
    the environment variable A2TGPO_SEARCH_TOKEN, if it exists."""
    max_shortfall: float = 8.0
    """Before a run on GPUs, the pre-flight measures for a few seconds how many queries a second the server answers.
    If the planned rollout needs more, the pre-flight warns. If it needs more than max_shortfall times as many, the
    run is refused; 0: never."""

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
        # `require` is not used here because its message would show the password.
        if "@" in "".join(self.url.split("/", 3)[2:3]):
            raise ConfigError(
                "search.url contains a user name or password; use search.token_file for a token"
            )

    @property
    def longest_call_s(self) -> float:
        """Upper limit of the seconds that one search takes. They include all its attempts, the wait for one trial of
        another query, and the waits between attempts.
        """
        return 2 * self.request_timeout_s * (self.max_attempts + 1)

    def require_source(self) -> None:
        """Raise `ConfigError` if the source that `backend` needs is not set; called only if the run has the search
        tool.
        """
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
                bool(self.url_file) or self.url.startswith(("http://", "https://")),
                "search.url",
                self.url,
                "an http:// or https:// address, with search.backend=http and without search.url_file",
            )
