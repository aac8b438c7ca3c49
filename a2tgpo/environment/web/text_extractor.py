"""Extract the main texts of web pages in helper processes, which end if a page takes too long."""

from __future__ import annotations

import base64

from a2tgpo.environment.tool import ToolError
from a2tgpo.environment.web.page import PageError
from a2tgpo.lifecycle.helper_process import HelperPool, HelperStartError, RequestFailedError

NUM_HELPERS = 4
"""Largest number of helper processes of a rank."""


class TextExtractor:
    """Extracts main texts. Threads may share it."""

    def __init__(self) -> None:
        self._helpers = HelperPool("a2tgpo.environment.web.page_text", number=NUM_HELPERS)

    def check(self) -> None:
        """Start a helper. Raise `HelperStartError` if it does not start, for example because a package is missing."""
        self._helpers.ask("", "", False)

    def text(self, body: bytes | str, url: str) -> str | None:
        """Return the main text of an HTML page, or None if it has none.

        Args:
            body: the decoded page, or its bytes if the server did not give the charset.

        Raises:
            PageError: the page cannot be parsed, or takes too long.
            ToolError: no process could be started.
        """
        is_base64 = isinstance(body, bytes)
        content = base64.b64encode(body).decode() if isinstance(body, bytes) else body
        try:
            text = self._helpers.ask(content, url, is_base64)
        except TimeoutError:
            raise PageError("the page takes too long to read") from None
        except RequestFailedError:  # the parsers fail on some texts that a server may send
            raise PageError("the page cannot be parsed") from None
        except HelperStartError as error:
            raise ToolError(str(error)) from None
        return None if text is None else str(text)

    def close(self) -> None:
        self._helpers.close()
