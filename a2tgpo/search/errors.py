"""The ways a search is said to have failed; messages are one line with the cause."""


class SearchError(RuntimeError):
    """A query that got no answer."""


class SearchUnavailableError(SearchError):
    """The server did not serve: the same query may have an answer later.

    Args:
        may_be_the_query: the server may serve other queries and fail at this one.
    """

    def __init__(self, message: str, *, may_be_the_query: bool = False):
        super().__init__(message)
        self.may_be_the_query = may_be_the_query
