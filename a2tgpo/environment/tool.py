"""The interface through which a rollout calls its tools."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from a2tgpo.config.run import RunConfig
from a2tgpo.config.tools import TOOLS_PACKAGE


class ToolError(RuntimeError):
    """Raised if a call has no answer. The message gives the cause in one line, which the policy reads."""


class ToolUnavailableError(ToolError):
    """Raised if the tool's service seems to be unavailable to all callers. The same call may succeed later."""


class Tool(Protocol):
    """A tool that the policy can call. Many threads may call its methods at the same time."""

    def call(self, text: str) -> list[str]:
        """Return the parts of the answer to `text`, at least one, the best first.

        If the policy has made a mistake, return an answer that explains the mistake.

        Args:
            text: the policy's text between the tool's tags. It is not empty, and has single spaces.

        Raises:
            ToolError: if there is no answer.
            ToolUnavailableError: if no call has an answer at present. `tools.on_outage` then decides what happens.
        """

    def close(self) -> None:
        """Release the tool's resources. The tool is not called after this."""


@dataclass(frozen=True, kw_only=True)
class Toolset:
    """The tools of a run and the limits that they share."""

    tools: Mapping[str, Tool]
    """Maps each tool's name to the tool. The name is also the tag of the tool's calls."""
    max_concurrent_calls: int = 16
    """Largest number of calls that run at the same time on one rank."""
    call_timeout_s: float = 240.0
    """Seconds from the start of a call until the call fails. Time in the queue does not count."""
    outage_limit_s: float | None = None
    """Seconds for which a call is repeated if it raises `ToolUnavailableError`. 0: the run ends at once. None: the
    call fails without being repeated, and the policy reads that it failed."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tools)

    def take_counts(self) -> dict[str, int]:
        """Return the counts of the tools since the last call of this method, by the names `TOOL/COUNT`.

        A tool reports counts if it has a method `take_counts`.
        """
        return {
            f"{name}/{count}": number
            for name, tool in self.tools.items()
            for count, number in getattr(tool, "take_counts", dict)().items()
        }

    def close(self) -> None:
        for tool in self.tools.values():
            tool.close()


def build_tools(config: RunConfig) -> Toolset:
    """Build the tools that `tools.names` lists. Every rank must build its own tools.

    Raises:
        ConfigError: with a one-line message, if a tool cannot work with this configuration.
    """
    tools: dict[str, Tool] = {}
    for name in config.tools.names:
        tools[name] = importlib.import_module(f"{TOOLS_PACKAGE}.{name}").build(config)
    return Toolset(
        tools=MappingProxyType(tools),
        max_concurrent_calls=config.tools.max_concurrent_calls,
        call_timeout_s=config.tools.call_timeout_s,
        outage_limit_s=config.tools.longest_outage_s,
    )
