"""Errors of a search. Each message is one line with the cause."""


class SearchError(RuntimeError):
    """Raised if a query got no answer."""


class SearchUnavailableError(SearchError):
    """Raised if the server did not answer a query, but may answer it later.

    If `may_be_the_query` is True, the server may answer other queries now.
    """

    def __init__(self, message: str, *, may_be_the_query: bool = False):
        super().__init__(message)
        self.may_be_the_query = may_be_the_query
