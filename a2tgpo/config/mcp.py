"""Settings of the mcp tool, which calls a tool of an MCP server (Model Context Protocol)."""

from dataclasses import dataclass

from a2tgpo.config.expand import Expanded
from a2tgpo.io.errors import require
from a2tgpo.io.web_address import is_http_address


@dataclass(frozen=True, kw_only=True)
class McpConfig:
    """The MCP server, and the server's tool that the policy calls (docs/tools.md)."""

    command: tuple[str, ...] = ()
    """Program and arguments that start the server. Requests go to the server's standard input, and answers come
    from its standard output."""
    url: Expanded = ""
    """Address of a running server (Streamable HTTP), instead of `command`."""
    tool: str = ""
    """Name of the server's tool. Empty: the server's only tool."""
    timeout_s: float = 60.0
    """Longest time, in seconds, that a call waits for the server's answer. A server that `command` starts may
    also take this long to start."""
    stateful: bool = False
    """`true`: each trajectory has its own connection, and with `command` its own server process. `false`: all
    trajectories of a rank share one connection."""

    def __post_init__(self) -> None:
        require(self.timeout_s > 0, "mcp.timeout_s", self.timeout_s, "> 0")

    def require_server(self) -> None:
        """Raise `ConfigError` unless exactly one server is named; called only if the run has the tool."""
        is_one = bool(self.command) != bool(self.url)
        require(
            is_one, "mcp.command", list(self.command), f"a command, or mcp.url ({self.url!r}), and not both"
        )
        is_address = bool(self.command) or is_http_address(self.url)
        require(is_address, "mcp.url", self.url, "an http:// or https:// address")
