"""The search tool's source of passages, and how it queries a retrieval server."""

from dataclasses import dataclass
from typing import Literal

from a2tgpo.config.expand import Expanded
from a2tgpo.io.errors import ConfigError, require


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """The source of passages: an index in the run's own processes, or a retrieval server."""

    backend: Literal["bm25", "http"] = "bm25"
    """bm25 (each process indexes `corpus`) or http (a Search-R1 compatible server at `url`)."""
    corpus: Expanded = ""
    """With bm25: JSONL file of passages, each with `id` and `contents` ("title"\\ntext)."""
    url: Expanded = ""
    """With http: address of the retrieval server's endpoint, e.g. http://127.0.0.1:8000/retrieve."""
    url_file: Expanded = ""
    """Instead of `url`: file with that address, as `tools/retrieval_server.py --url-file` writes it. The client reads
    it again when the server does not answer, so that the server may move."""
    top_k: int = 3
    """Passages returned for a query (paper: 3)."""
    request_timeout_s: float = 30.0
    """Longest wait for the server's answer to one request, seconds."""
    max_attempts: int = 3
    """Attempts of one query, within seconds of each other, before the server counts as out of service."""
    break_after: int = 16
    """Consecutive failures that open the circuit breaker: further searches fail at once."""
    break_s: float = 15.0
    """Seconds that the circuit breaker stays open before one trial query, and again after a trial that fails."""
    token_file: Expanded = ""
    """File with the bearer token that the server requires; empty: A2TGPO_SEARCH_TOKEN in the environment, if set."""
    max_shortfall: float = 8.0
    """Before a run on GPUs, the pre-flight measures the server for a few seconds. It warns if the server answers
    fewer queries a second than the planned rollout needs, and refuses the run beyond this factor; 0: never."""

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
        # Do not use `require`: its message would show the secret.
        if "@" in "".join(self.url.split("/", 3)[2:3]):
            raise ConfigError(
                "search.url contains a user name or password; use search.token_file for a token"
            )

    @property
    def longest_call_s(self) -> float:
        """Longest search, seconds: all attempts, one trial of another query, and the waits between them."""
        return 2 * self.request_timeout_s * (self.max_attempts + 1)

    def require_source(self) -> None:
        """Raise `ConfigError` unless the backend's source is named; only for runs that offer the search tool."""
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
