"""The one way a search is said to have failed."""


class SearchError(RuntimeError):
    """A query that got no answer; the message is one line with the cause."""
