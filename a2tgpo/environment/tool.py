"""The interface through which a rollout calls its tools. It is the same for all tools."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from a2tgpo.config.run import RunConfig
from a2tgpo.config.tools import TOOLS_PACKAGE


class ToolError(RuntimeError):
    """Raised if a call has no answer. The message is one line that gives the cause; the policy reads this message."""


class ToolUnavailableError(ToolError):
    """Raised if the tool's service seems to be unavailable to all callers; the same call may succeed later."""


class Tool(Protocol):
    """A tool that the policy can call. Many threads may call its methods at the same time."""

    def call(self, text: str) -> list[str]:
        """Return the parts of the answer to `text`, of which there is at least one. The best part comes first.

        If the policy has made a mistake, return an answer that explains the mistake.

        Args:
            text: the policy's text between the tool's tags. It is not empty, and runs of spaces are reduced to one.

        Raises:
            ToolError: there is no answer.
            ToolUnavailableError: no call has an answer at present; `tools.on_outage` decides what happens then.
        """

    def close(self) -> None:
        """Release the tool's resources. The tool is not called after this."""


@dataclass(frozen=True, kw_only=True)
class Toolset:
    """The tools of a run and the limits that they share."""

    tools: Mapping[str, Tool]
    """Maps each tool's name, which is also the tag of its calls, to the tool."""
    max_concurrent_calls: int = 16
    """Largest number of calls that run at the same time on one rank."""
    call_timeout_s: float = 240.0
    """A call fails if it has not returned this many seconds after its start. Time that the call waits in the queue
    does not count."""
    max_part_tokens: int = 400
    """If a part of an answer is longer than this many tokens, it is cut to this length."""
    outage_limit_s: float | None = None
    """Seconds for which a call is repeated if it raises `ToolUnavailableError`. 0: the run ends at once. None: the
    call fails without being repeated, and the policy reads that it failed."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tools)

    def take_counts(self) -> dict[str, int]:
        """Return the counts of all tools that have a method `take_counts`, by the names `TOOL/COUNT`.

        They cover the time since the last call of this method.
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
    """Build the tools that `tools.names` lists, with their modules in `environment/tools/`. Every rank must build its
    own tools.

    Raises:
        ConfigError: one line; a tool cannot work with this configuration.
    """
    tools: dict[str, Tool] = {}
    for name in config.tools.names:
        tools[name] = importlib.import_module(f"{TOOLS_PACKAGE}.{name}").build(config)
    return Toolset(
        tools=MappingProxyType(tools),
        max_concurrent_calls=config.tools.max_concurrent_calls,
        call_timeout_s=config.tools.call_timeout_s,
        max_part_tokens=config.tools.max_part_tokens,
        outage_limit_s=config.tools.longest_outage_s,
    )
