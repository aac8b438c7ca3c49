"""The search tool, which returns passages for a query."""

from collections.abc import Mapping
from typing import Any

from a2tgpo.config.run import RunConfig
from a2tgpo.environment.tool import ToolError, ToolUnavailableError
from a2tgpo.search.errors import SearchError, SearchUnavailableError
from a2tgpo.search.passage import format_passage
from a2tgpo.search.tool import SearchTool, build_search

NOTHING_FOUND = "No passage was found."


class Search:
    """Answers a call with passages, each formatted as in Search-R1."""

    description = "Returns passages that match a query."
    parameters: Mapping[str, Any] = {
        "type": "object",
        "properties": {"query": {"type": "string", "description": "What to look for."}},
        "required": ["query"],
    }

    def __init__(self, search: SearchTool):
        self._search = search

    def call(self, text: str) -> list[str]:
        try:
            passages = self._search.search(text)
        except SearchUnavailableError as error:
            raise ToolUnavailableError(str(error)) from None
        except SearchError as error:
            raise ToolError(str(error)) from None
        formatted = [format_passage(rank, passage) for rank, passage in enumerate(passages, start=1)]
        return formatted or [NOTHING_FOUND]

    def take_counts(self) -> dict[str, int]:
        return self._search.take_counts()

    def close(self) -> None:
        self._search.close()


def build(config: RunConfig) -> Search:
    """Build the search tool for a corpus in this process or for a retrieval server."""
    return Search(
        build_search(
            config.search,
            max_connections=config.tools.max_concurrent_calls,
            tells_outages=config.tools.on_outage != "continue",
        )
    )
