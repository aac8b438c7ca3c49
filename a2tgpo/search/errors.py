"""Errors of a search; each message is one line that states the cause."""


class SearchError(RuntimeError):
    """A query got no answer."""


class SearchUnavailableError(SearchError):
    """The server did not serve the query; the same query may succeed later.

    Args:
        may_be_the_query: whether this query may be the cause, so that the server might answer other queries.
    """

    def __init__(self, message: str, *, may_be_the_query: bool = False):
        super().__init__(message)
        self.may_be_the_query = may_be_the_query
