"""The program of a helper process of the tool `visit`, which extracts the main text of web pages.

The pages are untrusted: the extractor may take long, and its libraries in C may crash.
"""

from __future__ import annotations

import base64

from a2tgpo.config.web import LONGEST_EXTRACTION_S
from a2tgpo.lifecycle.helper_process import serve

EXTRACT_S = 10
"""Longest CPU time in seconds for the text of one page."""


def main_text(body: str, url: str, is_base64: bool) -> str | None:
    """Return the main text of an HTML page, or None if it has none.

    Args:
        body: the decoded page, or its bytes in base64 if the server did not give the charset.
    """
    import trafilatura

    content = base64.b64decode(body) if is_base64 else body
    text = trafilatura.extract(content, url=url, favor_recall=True, include_tables=True)
    return None if text is None else str(text)


if __name__ == "__main__":
    serve(
        main_text,
        example=("<p>text</p>", "http://a.example", False),
        cpu_s=EXTRACT_S,
        longest_s=LONGEST_EXTRACTION_S,
    )
