"""Text for a terminal: colours where they are wanted, nothing that could change its state."""

from __future__ import annotations

import os
import re
import signal
import unicodedata
from typing import TextIO

_TAG = re.compile(r"</?\w{1,20}>")
# Parts of words in Persian, Indic scripts and emoji, though Python does not count them as printable.
_JOINERS = "\u200c\u200d"
_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


class Painter:
    """Colours, or none."""

    def __init__(self, colored: bool):
        self._colored = colored

    def __call__(self, text: str, style: str) -> str:
        return f"\033[{_STYLES[style]}m{text}\033[0m" if self._colored else text

    def tags(self, text: str) -> str:
        """`text` with its tags in colour."""
        return _TAG.sub(lambda tag: self(tag.group(), "cyan"), text)


def painter_for(stream: TextIO) -> Painter:
    """Colours if `stream` is a terminal whose user has not refused them (NO_COLOR)."""
    return Painter(stream.isatty() and "NO_COLOR" not in os.environ)


def end_with_reader() -> None:
    """Have this process end without a word, as other programs do, when what reads its output (`| head`) has."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def indented(text: str) -> str:
    """`text` set in, with control characters, which a model may well write, made visible."""
    clean = "".join(
        c if c in "\n\t" or c.isprintable() or c in _JOINERS or unicodedata.category(c) == "Zs" else "\ufffd"
        for c in text
    )
    return "\n".join("    " + line for line in clean.strip("\n").split("\n"))
