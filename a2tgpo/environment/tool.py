"""The interface between a rollout and its tools: one call, with any backend."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from a2tgpo.config.run import RunConfig
from a2tgpo.config.tools import TOOLS_PACKAGE


class ToolError(RuntimeError):
    """A call got no answer; the message is one line with the cause, which the policy reads."""


class ToolUnavailableError(ToolError):
    """The tool's backend appears to be down for all callers; the same call may succeed later."""


class Tool(Protocol):
    """Safe to call from many threads at once."""

    def call(self, text: str) -> list[str]:
        """Return the parts of the answer to `text`, best first, at least one.

        Args:
            text: the policy's text between the tool's tags, spaces squeezed, never empty.

        Raises:
            ToolError: there is no answer. For a mistake of the policy, return an answer that explains the mistake.
            ToolUnavailableError: no call gets an answer now; see `tools.on_outage`.
        """

    def close(self) -> None:
        """Release resources; the tool is not called afterwards."""


@dataclass(frozen=True, kw_only=True)
class Toolset:
    """The tools of a run and the limits that they share."""

    tools: Mapping[str, Tool]
    """By name, which is also the tag of a call."""
    max_concurrent_calls: int = 16
    """Concurrent calls per rank that calls tools."""
    call_timeout_s: float = 240.0
    """A call fails if it has not returned this many seconds after its start; time in the queue does not count."""
    max_part_tokens: int = 400
    """Each part of an answer is cut to this many tokens."""
    outage_limit_s: float | None = None
    """Seconds for which a call that raised `ToolUnavailableError` is retried. 0: the run ends at once. None: the call
    fails without a retry, and the policy reads the failure."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tools)

    def take_counts(self) -> dict[str, int]:
        """Return, as `TOOL/COUNT`, what tools with a method `take_counts` have counted since the last call."""
        return {
            f"{name}/{count}": number
            for name, tool in self.tools.items()
            for count, number in getattr(tool, "take_counts", dict)().items()
        }

    def close(self) -> None:
        for tool in self.tools.values():
            tool.close()


def build_tools(config: RunConfig) -> Toolset:
    """Build the tools named in `tools.names`, from `environment/tools/`; every rank builds its own.

    Raises:
        ConfigError: one line; a tool cannot work as configured.
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
