"""The visit tool, which reads the text of a web page. The section `visit` sets limits for pages."""

from __future__ import annotations

import codecs
import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

from a2tgpo.config.run import RunConfig
from a2tgpo.environment.web.cassette import Cassette
from a2tgpo.environment.web.page import Page, PageError, PageReader
from a2tgpo.environment.web.public_address import is_public
from a2tgpo.environment.web.text_extractor import TextExtractor
from a2tgpo.io.errors import ConfigError
from a2tgpo.lifecycle.helper_process import HelperStartError

NO_PAGE = "The page is not available."
NO_TEXT = "The page has no text."
CUT = "\n... (the rest of the page is left out)"
_NOT_OF_PAGES = ("idna", "punycode")
"""Codecs that are not used for pages. idna cannot replace invalid bytes, and punycode takes quadratic time."""
_HTML = ("text/html", "application/xhtml+xml")


class Visit:
    """Answers a call, which is the address of a page, with the page's text.

    Args:
        reader: reads pages. None if only recorded answers are used.
        extractor: extracts the texts of HTML pages. None if only recorded answers are used.
        max_chars: number of characters to which a text is cut.
    """

    description = "Reads the text of a web page."
    parameters: Mapping[str, Any] = {
        "type": "object",
        "properties": {"url": {"type": "string", "description": "The address of the page."}},
        "required": ["url"],
    }

    def __init__(
        self,
        *,
        reader: PageReader | None,
        extractor: TextExtractor | None,
        cassette: Cassette,
        max_chars: int,
    ):
        self._reader = reader
        self._extractor = extractor
        self._cassette = cassette
        self._max_chars = max_chars
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def call(self, text: str) -> list[str]:
        request = {"tool": "visit", "url": text.strip(), "max_chars": self._max_chars}
        recorded = self._cassette.find(request)
        source = "requests" if self._reader is not None else "cassette_misses"
        with self._lock:
            self._counts["recorded" if recorded is not None else source] += 1
        if recorded is not None:
            return recorded
        if self._reader is None:
            return [NO_PAGE]
        try:
            answer = self._text(self._reader.read(text.strip()))
        except PageError as error:
            answer = f"Error: {error}"
        self._cassette.record(request, [answer])
        return [answer]

    def take_counts(self) -> dict[str, int]:
        """Return the numbers of requests, recorded answers and cassette misses since the last call."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return dict(counts)

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        if self._extractor is not None:
            self._extractor.close()

    def _text(self, page: Page) -> str:
        if page.content_type in _HTML:
            assert self._extractor is not None
            text = self._extractor.text(page.body if page.charset is None else _decoded(page), page.url) or ""
        elif page.content_type.startswith("text/"):
            text = _decoded(page)
        else:
            raise PageError(f"the page is {page.content_type:.60}, not a text")
        text = text.strip() or NO_TEXT
        return text if len(text) <= self._max_chars else text[: self._max_chars].rstrip() + CUT


def build(config: RunConfig) -> Visit:
    """Build the tool.

    Raises:
        ConfigError: with a one-line message, if the packages that extract texts are missing.
    """
    visit, cassette = config.visit, Cassette(config.web.cassette)
    if config.web.backend == "recorded":
        return Visit(reader=None, extractor=None, cassette=cassette, max_chars=visit.max_chars)
    extractor = TextExtractor()
    try:
        extractor.check()
    except HelperStartError as error:
        raise ConfigError(
            f"tools.names has visit, but the packages that read pages cannot be used ({error}); install them "
            "with pip install 'a2tgpo[web]', or use recorded pages with web.backend=recorded"
        ) from None
    reader = PageReader(
        timeout_s=visit.timeout_s,
        max_bytes=visit.max_bytes,
        is_allowed=(lambda address: True) if visit.allow_private else is_public,
        max_connections=config.tools.max_concurrent_calls,
    )
    return Visit(reader=reader, extractor=extractor, cassette=cassette, max_chars=visit.max_chars)


def _decoded(page: Page) -> str:
    """Return the text of a page in the charset that the server gave, or in UTF-8 if this charset is unusable."""
    charset = page.charset or "utf-8"
    try:
        if codecs.lookup(charset).name not in _NOT_OF_PAGES:
            return page.body.decode(charset, "replace")
    except (LookupError, ValueError):  # a charset that does not exist, or that is not a text encoding
        pass
    return page.body.decode("utf-8", "replace")
