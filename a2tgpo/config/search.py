"""The search tool, and the limits of all tools."""

from dataclasses import dataclass

from a2tgpo.config.expand import Expanded
from a2tgpo.io.errors import ConfigError, require


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Where passages come from and how many the policy sees."""

    backend: str = "bm25"
    """bm25 (index built in process over `corpus`) | http (Search-R1 compatible server at `url`)."""
    corpus: Expanded = ""
    """JSONL file of passages, each with `id` and `contents` ("title"\\ntext); used by bm25."""
    url: Expanded = ""
    """Address of the retrieval server's endpoint, e.g. http://127.0.0.1:8000/retrieve; used by http."""
    url_file: Expanded = ""
    """File that holds that address, as `tools/retrieval_server.py --url-file` writes it, in place of `url`. It is
    read again when the server does not answer, so that the server may move."""
    top_k: int = 3
    """Passages returned for a query (paper: 3)."""
    max_passage_tokens: int = 400
    """Each passage, or other part of a tool's answer, is cut to this many tokens."""
    timeout_s: float = 30.0
    """Longest wait for one answer, seconds."""
    max_attempts: int = 3
    """Tries of one query, within seconds of each other, before the server counts as out of service."""
    on_outage: str = "wait"
    """What happens when the server is out of service: wait (the rollout pauses, and its searches are made again until
    the server is back) | continue (the policy is told that the search failed) | stop (the run saves and ends)."""
    outage_limit_s: float = 1800.0
    """With on_outage=wait: the run saves and ends, with exit code 75, when the server has not answered for so long,
    seconds; below parallel.timeout_s, since other ranks may wait in a collective meanwhile."""
    break_after: int = 16
    """Queries in a row without an answer after which the server is spared for a while: searches fail at once."""
    break_s: float = 15.0
    """How long it is spared before one query is sent to see whether it is back, seconds; and so on."""
    token_file: Expanded = ""
    """File with the bearer token the server asks for; empty: A2TGPO_SEARCH_TOKEN in the environment, if set."""
    num_workers: int = 16
    """Tool calls in flight per rank."""
    max_shortfall: float = 8.0
    """Before a run on GPUs, the pre-flight measures the server for some seconds. It warns if the server answers fewer
    queries a second than the planned rollout needs, and refuses the run if by more than this factor; 0: never."""

    def __post_init__(self) -> None:
        require(self.backend in ("bm25", "http"), "search.backend", self.backend, "bm25 | http")
        for name in ("top_k", "max_passage_tokens", "max_attempts", "break_after", "num_workers"):
            require(getattr(self, name) >= 1, f"search.{name}", getattr(self, name), ">= 1")
        require(
            self.on_outage in ("wait", "continue", "stop"),
            "search.on_outage",
            self.on_outage,
            "wait | continue | stop",
        )
        for name in ("timeout_s", "break_s", "outage_limit_s"):
            require(getattr(self, name) > 0, f"search.{name}", getattr(self, name), "> 0")
        require(
            self.max_shortfall == 0 or self.max_shortfall >= 1,
            "search.max_shortfall",
            self.max_shortfall,
            "0, or >= 1",
        )
        # Not with `require`, whose message would show the secret.
        if "@" in "".join(self.url.split("/", 3)[2:3]):
            raise ConfigError("search.url holds a user name or password; give a token by search.token_file")

    @property
    def longest_outage_s(self) -> float | None:
        """Seconds for which a rollout waits for its server; None: it continues at once without an answer."""
        return {"wait": self.outage_limit_s, "stop": 0.0, "continue": None}[self.on_outage]

    def require_source(self) -> None:
        """Raise `ConfigError` unless the backend's source is set; call this only if the search tool is offered."""
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
