"""Text for a terminal: optional colours, and no characters that could change its state."""

from __future__ import annotations

import os
import re
import signal
import unicodedata
from typing import TextIO

_TAG = re.compile(r"</?\w{1,20}>")
# Joiners, which occur within words in Persian, Indic scripts and emoji, although Python considers them unprintable.
_JOINERS = "\u200c\u200d"
_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


class Painter:
    """Adds colours if enabled."""

    def __init__(self, colored: bool):
        self._colored = colored

    def __call__(self, text: str, style: str) -> str:
        return f"\033[{_STYLES[style]}m{text}\033[0m" if self._colored else text

    def tags(self, text: str) -> str:
        """Colour the tags in `text`."""
        return _TAG.sub(lambda tag: self(tag.group(), "cyan"), text)


def painter_for(stream: TextIO) -> Painter:
    """Return a painter with colours if `stream` is a terminal and NO_COLOR is not set."""
    return Painter(stream.isatty() and "NO_COLOR" not in os.environ)


def end_with_reader() -> None:
    """End this process silently, like other programs, when the reader of its output (`| head`) ends."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def indented(text: str) -> str:
    """Indent `text`, and make control characters, which a model may write, visible."""
    clean = "".join(
        c if c in "\n\t" or c.isprintable() or c in _JOINERS or unicodedata.category(c) == "Zs" else "\ufffd"
        for c in text
    )
    return "\n".join("    " + line for line in clean.strip("\n").split("\n"))
