"""A search tool with answers, delays and failures that a test sets."""

import threading
import time

from a2tgpo.environment.tool import Toolset
from a2tgpo.environment.tools.search import Search
from a2tgpo.search.errors import SearchError
from a2tgpo.search.passage import Passage


class ScriptedSearch:
    """Answers every query with one passage about it.

    Args:
        delays: seconds by query.
        failing: queries that end in `SearchError`.
        text: text of the passage, in which `{}` is replaced by the query.
    """

    def __init__(self, *, delays=None, failing=(), text="{} is known."):
        self.delays = delays or {}
        self.failing = set(failing)
        self.text = text
        self.queries = []
        self._lock = threading.Lock()

    def search(self, query):
        with self._lock:
            self.queries.append(query)
        time.sleep(self.delays.get(query, 0.0))
        if query in self.failing:
            raise SearchError(f"no route to {query}")
        return [Passage("p", query, self.text.format(query))]

    def take_counts(self):
        return {}

    def close(self):
        """Do nothing."""


def toolset_of(search, *, more_tools=None, **limits):
    """Return a toolset with the search tool `search`, and other tools by name. `limits` are those of `Toolset`."""
    return Toolset(tools={"search": Search(search), **(more_tools or {})}, **limits)
