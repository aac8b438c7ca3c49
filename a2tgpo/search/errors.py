"""Errors of a search. Each message is one line with the cause."""


class SearchError(RuntimeError):
    """A query got no answer."""


class SearchUnavailableError(SearchError):
    """The server did not serve the query, but may serve it later.

    If `may_be_the_query`, the server might answer other queries now.
    """

    def __init__(self, message: str, *, may_be_the_query: bool = False):
        super().__init__(message)
        self.may_be_the_query = may_be_the_query
