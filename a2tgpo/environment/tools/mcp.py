"""The mcp tool, which calls a tool of an MCP server (Model Context Protocol). The section `mcp` names the server and
the tool."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from a2tgpo.config.mcp import McpConfig
from a2tgpo.config.run import RunConfig
from a2tgpo.environment.tool import ToolError, ToolUnavailableError
from a2tgpo.io.errors import ConfigError, first_line, one_of

if TYPE_CHECKING:
    from anyio.from_thread import BlockingPortal

NO_TEXT = "The answer has no text."


class McpTool:
    """Answers calls over one connection, which is opened again if it breaks.

    Args:
        config: the section `mcp`.
    """

    def __init__(self, config: McpConfig):
        self._config = config
        self._lock = threading.Lock()
        self._connection: Connection | None = Connection(config)
        try:
            tool = _find(self._connection.tools(), config.tool)
        except BaseException:
            self._connection.close()
            raise
        self._name = str(tool.name)
        self.description = str(tool.description or "")
        properties = tool.input_schema.get("properties") or {}
        # A JSON schema may also be true, which allows every value.
        described = {name: one if isinstance(one, Mapping) else {} for name, one in properties.items()}
        self.parameters: Mapping[str, Any] = {**tool.input_schema, "properties": described}

    def call(self, text: str) -> list[str]:
        arguments = self._arguments(text)
        if arguments is None:
            return ["Error: the arguments are not a JSON object"]
        connection = self._connected()
        try:
            return connection.call(self._name, arguments)
        except ConnectionError as error:  # do not repeat the call, which may have ended the server
            self._drop(connection)
            raise ToolError(str(error)) from None

    def close(self) -> None:
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _arguments(self, text: str) -> dict[str, Any] | None:
        """Return the call's arguments, or None if `text` is not a JSON object. If the tool takes only one text,
        `text` is its argument."""
        properties = self.parameters.get("properties", {})
        if [schema.get("type") for schema in properties.values()] == ["string"]:
            return dict.fromkeys(properties, text)
        try:
            arguments = json.loads(text)
            json.dumps(
                arguments, ensure_ascii=False
            ).encode()  # half of a surrogate pair would end the connection
        except (ValueError, RecursionError):
            return None
        return arguments if isinstance(arguments, dict) else None

    def _connected(self) -> Connection:
        with self._lock:
            if self._connection is None:
                self._connection = Connection(self._config)
            return self._connection

    def _drop(self, connection: Connection) -> None:
        with self._lock:
            if self._connection is connection:
                self._connection = None
        connection.close()


class StatefulMcpTool:
    """Gives each trajectory its own `McpTool`."""

    def __init__(self, config: McpConfig):
        self._config = config
        first = McpTool(config)
        self.description, self.parameters = first.description, first.parameters
        first.close()

    def open(self, record: Mapping[str, Any], question: str) -> McpTool:
        """Return a connection to a new server.

        Raises:
            ToolUnavailableError: the server does not start, or it no longer has the tool.
        """
        try:
            return McpTool(self._config)
        except ConfigError as error:  # the first server had the tool, so the configuration is right
            raise ToolUnavailableError(f"the MCP server has other tools than at the start: {error}") from None

    def close(self) -> None:
        """Do nothing, because each session closes its own connection."""


class Connection:
    """A connection to a server, run by an event loop in its own thread. Many threads may use the connection.

    Raises:
        ToolUnavailableError: the server does not start or answer.
    """

    def __init__(self, config: McpConfig):
        from anyio.from_thread import start_blocking_portal
        from mcp import Client, StdioServerParameters

        server: Any = config.url
        if config.command:
            server = StdioServerParameters(command=config.command[0], args=list(config.command[1:]))
        self._timeout_s = config.timeout_s
        self._resources = contextlib.ExitStack()
        self._portal: BlockingPortal = self._resources.enter_context(start_blocking_portal())
        client = Client(server, read_timeout_seconds=config.timeout_s)
        try:
            self._client = self._resources.enter_context(self._portal.wrap_async_context_manager(client))
        except Exception as error:
            self.close()
            raise ToolUnavailableError(f"the MCP server does not start: {_cause(error)}") from None

    def tools(self) -> Sequence[Any]:
        """Return the descriptions of the server's tools."""
        try:
            return list(self._portal.call(self._client.list_tools).tools)
        except Exception as error:
            raise ToolUnavailableError(f"the MCP server does not list its tools: {_cause(error)}") from None

    def call(self, name: str, arguments: dict[str, Any]) -> list[str]:
        """Return the texts of the answer.

        Raises:
            ToolError: the server refuses the call, or does not answer in time.
            ConnectionError: the connection has ended.
        """
        from mcp import MCPError
        from mcp.types import CONNECTION_CLOSED

        try:
            result = self._portal.call(self._client.call_tool, name, arguments)
        except MCPError as error:
            if error.error.code == CONNECTION_CLOSED:
                raise ConnectionError("the MCP server ended the connection") from None
            raise ToolError(f"the MCP server says: {first_line(error):.200}") from None
        except Exception as error:
            raise ConnectionError(f"the connection to the MCP server is broken: {_cause(error)}") from None
        parts = [block.text for block in result.content if getattr(block, "text", None)]
        return parts or [NO_TEXT]

    def close(self) -> None:
        with contextlib.suppress(Exception):  # the server may already have ended
            self._resources.close()


def build(config: RunConfig) -> McpTool | StatefulMcpTool:
    """Build the tool.

    Raises:
        ConfigError: with a one-line message, if the package mcp is missing, or if the server does not work.
    """
    try:
        import mcp  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"tools.names has mcp, but the package cannot be imported ({error}); install it with "
            "pip install 'a2tgpo[mcp]'"
        ) from None
    try:
        return StatefulMcpTool(config.mcp) if config.mcp.stateful else McpTool(config.mcp)
    except ToolUnavailableError as error:
        where = list(config.mcp.command) or config.mcp.url
        raise ConfigError(
            f"mcp.{'command' if config.mcp.command else 'url'} is {where!r}, but {error}"
        ) from None


def _find(tools: Sequence[Any], name: str) -> Any:
    """Return the description of the tool `name`. An empty `name` means the server's only tool."""
    names = [str(tool.name) for tool in tools]
    if name in names:
        return tools[names.index(name)]
    if not name and len(names) == 1:
        return tools[0]
    raise ConfigError(f"mcp.tool is {name!r}; allowed: {one_of(names, name)}")


def _cause(error: BaseException) -> str:
    """Return the first cause of an error, in one line. The event loop may wrap it in exception groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {first_line(error):.200}"
