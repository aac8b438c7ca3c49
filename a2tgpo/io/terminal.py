"""Format text for a terminal: add colours, and replace characters that could change the terminal's state."""

from __future__ import annotations

import os
import re
import signal
import unicodedata
from typing import TextIO

_TAG = re.compile(r"</?\w{1,20}>")
# Python considers the zero-width joiners unprintable, but emoji and some Persian words contain them.
_JOINERS = "\u200c\u200d"
_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


class Painter:
    """Adds colours to text for a terminal, unless they are disabled."""

    def __init__(self, colored: bool):
        self._colored = colored

    def __call__(self, text: str, style: str) -> str:
        return f"\033[{_STYLES[style]}m{text}\033[0m" if self._colored else text

    def tags(self, text: str) -> str:
        """Return `text` with its tags, such as <search>, coloured."""
        return _TAG.sub(lambda tag: self(tag.group(), "cyan"), text)


def painter_for(stream: TextIO) -> Painter:
    """Return a painter that adds colours only if `stream` is a terminal and NO_COLOR is not set."""
    return Painter(stream.isatty() and "NO_COLOR" not in os.environ)


def end_with_reader() -> None:
    """From now on, end this process silently if the reader of its output, such as `| head`, ends first."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def indented(text: str) -> str:
    """Return `text` indented, with control characters replaced by a visible sign."""
    clean = "".join(
        c if c in "\n\t" or c.isprintable() or c in _JOINERS or unicodedata.category(c) == "Zs" else "\ufffd"
        for c in text
    )
    return "\n".join("    " + line for line in clean.strip("\n").split("\n"))
