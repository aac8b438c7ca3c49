"""What a tool is to a rollout: one call, whatever stands behind it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from a2tgpo.config.run import RunConfig
from a2tgpo.config.tools import TOOLS_PACKAGE


class ToolError(RuntimeError):
    """A call that got no answer; the message is one line with the cause, which the policy is told."""


class ToolUnavailableError(ToolError):
    """What stands behind the tool serves nobody, as far as is known: the same call may have an answer later."""


class Tool(Protocol):
    """Safe to call from many threads at once."""

    def call(self, text: str) -> list[str]:
        """The parts of the answer to `text`, best first, at least one.

        Args:
            text: what the policy wrote between the tool's tags, spaces squeezed, never empty.

        Raises:
            ToolError: if there is no answer. What the policy did wrong is an answer that says so.
            ToolUnavailableError: if no call has an answer now; see `search.on_outage`.
        """

    def close(self) -> None:
        """Give back what it holds; it is not called afterwards."""


@dataclass(frozen=True, kw_only=True)
class Toolset:
    """The tools of a run and the limits that they share."""

    tools: Mapping[str, Tool]
    """By name, which is also the tag that calls it."""
    num_workers: int = 16
    """Calls that run at a time, per rank that calls tools."""
    deadline_s: float = 240.0
    """A call that has not returned so long after its start has failed, seconds; time before the start is free."""
    max_part_tokens: int = 400
    """Each part of an answer is cut to this many tokens."""
    outage_limit_s: float | None = None
    """A call that ends in `ToolUnavailableError` is made again for so long, seconds; 0: the run ends at once; None:
    the call has failed, and the policy is told."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tools)

    def close(self) -> None:
        for tool in self.tools.values():
            tool.close()


def build_tools(config: RunConfig) -> Toolset:
    """The tools that `tools.names` names, from `environment/tools/`; every rank builds its own.

    Raises:
        ConfigError: one line; a tool that cannot work as configured.
    """
    tools: dict[str, Tool] = {}
    for name in config.tools.selected:
        tools[name] = importlib.import_module(f"{TOOLS_PACKAGE}.{name}").build(config)
    return Toolset(
        tools=MappingProxyType(tools),
        num_workers=config.search.num_workers,
        # A client bounds each try, one more to see whether the query is to blame, and waits between them; this bounds
        # what a client does not.
        deadline_s=2 * config.search.timeout_s * (config.search.max_attempts + 1),
        max_part_tokens=config.search.max_passage_tokens,
        outage_limit_s=config.search.longest_outage_s,
    )
